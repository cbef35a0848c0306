/* What the processes of protocol.pml share: macros, memory, permissions, and the steps on a rank's own blocks. */

#ifndef BLOCKS
#define BLOCKS 2          /* blocks of each rank's heap */
#endif
#ifndef BARRIERS
#define BARRIERS 0        /* 1: barriers among the operations (a rendezvous and nothing else) */
#endif
#ifndef FAILED
#define FAILED 0          /* how many records (over all ranks and operations) may say "failed" */
#endif
#ifndef SMALL
#define SMALL 0           /* how many offers may turn out too small */
#endif
#ifndef ASYNC
#define ASYNC 0           /* 1: a call may return before its rows have moved */
#endif
#ifndef DEATH
#define DEATH 0           /* 1: rank 0 may die at any step (any rank, by rotation symmetry) */
#endif
#ifndef INTERRUPT
#define INTERRUPT 0       /* 1: rank 0 may give up at one of its waits (Ctrl-C, deadline) */
#endif

#if defined(PLANT_NO_RELEASE) || defined(PLANT_EARLY_OFFER)
#define PROMISE(b) skip   /* let the plant run on, until a write meets a reader */
#else
#define PROMISE(b) assert(readers[b] == 0 && writers[b] == 0)
#endif

#ifdef PLANT_NO_CATCH_UP
#define NOT_WANTED(slot) skip
#else
#define NOT_WANTED(slot) assert(taken[slot] == 0)
#endif

#if DEATH || INTERRUPT
#define STEP_WHERE_FAULTS } atomic {
#else
#define STEP_WHERE_FAULTS
#endif

#define RANKS 3
#define OPS 3
#define NONE 7
#define EVERYONE 7        /* one bit per rank */

#define NOTHING 0         /* operations; NOTHING: the mover is idle */
#define DISPATCH 1
#define COMBINE 2
#define BARRIER 3

#define FREE 0            /* states of a block */
#define OFFERED 1         /* in a record; peers place rows in it */
#define TENSOR 2          /* the user's */
#define IN_PLACE 3        /* the user's, and the y of a combine in flight */
#define COPY 4            /* holds a copy of y until all readers released it */
#define QUARANTINED 5     /* never used again */

#define MOVED 1           /* outcomes of an operation */
#define REFUSED 2

#define BIT(r) (1 << (r))
#define PAIR(a, b) ((a) * RANKS + (b))
#define BLOCK(r, i) ((r) * BLOCKS + (i))
#define NEXT(k) ((me + (k)) % RANKS)   /* peers in rotated order: the model is symmetric under rotation of ranks */
#ifdef PLANT_ONE_SLOT
#define SLOT(r, n) ((r) * 2)
#else
#define SLOT(r, n) ((r) * 2 + (n) % 2)
#endif

#define ALL(word, n) (word[0] >= (n) && word[1] >= (n) && word[2] >= (n))
#define FROM_ALL(word, n) (word[PAIR(0, me)] >= (n) && word[PAIR(1, me)] >= (n) && word[PAIR(2, me)] >= (n))
#define SECOND_FROM(r, n) (!(small & BIT(r)) || second_seq[r] >= (n))

/*
 * A wait ends with its condition, or with trouble: poison on any rank, the death of a rank that it still waits for
 * (only rank 0 dies: `missing_0`), or by giving up, which is the fault itself. It may look at either first.
 */
#define ANY_POISON (poisoned[0] || poisoned[1] || poisoned[2])
#ifdef PLANT_DEAF_TO_DEATH
#define DEAD(missing_0) 0
#else
#define DEAD(missing_0) (!alive[0] && (missing_0))
#endif
#ifdef PLANT_DEAF_TO_POISON
#define POISON poisoned[me]
#else
#define POISON ANY_POISON
#endif
#define TROUBLE(missing_0) (POISON || DEAD(missing_0) || (me == 0 && gives_up))
#define WAIT(condition, missing_0) if :: condition :: TROUBLE(missing_0) -> goto raise fi
#define MOVER_IDLE (job[me] == NOTHING && !poisoned[me])

/* A combine needs the handle of a dispatch that took place. */
#define CAN_COMBINE (n > 1 && (ops[1] == DISPATCH && outcome[1] == MOVED || ops[2] == DISPATCH && outcome[2] == MOVED))

/* Shared memory: words and records that peers map. */
byte record_seq[RANKS];              /* last record published */
byte second_seq[RANKS];              /* last second record published */
byte arrive[9];                      /* PAIR(source, destination) */
byte released[9];                    /* PAIR(reader, owner) */
bit poisoned[RANKS];
byte slot_seq[6];                    /* ghost: whose content the slot holds */
byte slot_block[6];                  /* the offer, or where y lies */
bit slot_failed[6];
bit slot_small[6];
byte taken[6];                       /* ghost: how many ranks are done with the slot's record */
byte second_of[RANKS];               /* ghost: likewise for the one place of the second record */
byte second_block[RANKS];            /* NONE: cannot grow */

/* What the operating system tells (pidfd). */
bit alive[RANKS];

/* Private memory of a rank. */
byte state[6];                       /* sized for BLOCKS == 2 */
byte held[6];                        /* COPY: sequence number that all readers must release */
byte job[RANKS];                     /* handed from Rank to Mover */
byte job_seq[RANKS];
byte job_block[9];                   /* PAIR(me, peer): its block in this operation */
bit job_in_place[RANKS];

/* Ghosts and choices. */
byte readers[6];
byte writers[6];
byte outcome[OPS + 1];               /* every rank must come to the same one */
byte ops[OPS + 1];
bit drop_all[OPS + 1];               /* where faults are checked, all ranks drop their tensors before the same calls */
byte may_fail = FAILED;
byte may_be_small = SMALL;
bit gives_up = INTERRUPT;
bit faulty = 0;                      /* somebody really died or gave up */

hidden byte i;                       /* scratch, set before use within one d_step */
hidden byte b;

/* A free block, or NONE. A copy of y is free once all have released it: looked at only here. */
inline pick(found, except) {
    found = NONE;
    for (i : 0 .. BLOCKS - 1) {
        b = BLOCK(me, i);
        if
#ifdef PLANT_NO_RELEASE
        :: state[b] == COPY -> state[b] = FREE; held[b] = 0
#else
        :: state[b] == COPY && FROM_ALL(released, held[b]) -> state[b] = FREE; held[b] = 0
#endif
        :: else
        fi;
        if
        :: found == NONE && i != except && state[b] == FREE -> found = i
#ifdef PLANT_EARLY_OFFER
        :: found == NONE && i != except && state[b] == COPY && op == DISPATCH -> found = i; held[b] = 0
#endif
        :: else
        fi
    }
}

inline offer(which) {
    if
    :: which != NONE ->
        b = BLOCK(me, which);
        PROMISE(b);
        state[b] = OFFERED;
        writers[b] = EVERYONE
    :: else
    fi
}

/* Before the call the user drops tensors (`drops`, a mask) and may write those that remain. */
inline user_turn() {
    for (i : 0 .. BLOCKS - 1) {
        b = BLOCK(me, i);
        if
        :: state[b] == TENSOR ->
            assert(readers[b] == 0 && writers[b] == 0);
            if
            :: drops & BIT(i) -> state[b] = FREE
            :: else
            fi
        :: else
        fi
    }
}

/* The operation's own block: an offer, or where y lies. Failing to get one is a bad input like any other. */
inline prepare() {
    if
    :: failed -> mine = NONE
    :: !failed && op == DISPATCH ->
        pick(mine, NONE);
        if
        :: mine == NONE -> is_small = 1
        :: else
        fi;
        offer(mine)
    :: !failed && op == COMBINE ->
        mine = NONE;
        if
        :: in_place ->
            for (i : 0 .. BLOCKS - 1) {
                if
                :: mine == NONE && state[BLOCK(me, i)] == TENSOR -> mine = i
                :: else
                fi
            }
        :: else
        fi;
        if
        :: mine != NONE -> state[BLOCK(me, mine)] = IN_PLACE
        :: else ->
            in_place = 0;
            pick(mine, NONE);
            if
            :: mine == NONE -> failed = 1
            :: else ->
                assert(readers[BLOCK(me, mine)] == 0 && writers[BLOCK(me, mine)] == 0);   /* y is written here now */
                state[BLOCK(me, mine)] = COPY;
                held[BLOCK(me, mine)] = n
            fi
        fi;
        if
        :: mine != NONE -> readers[BLOCK(me, mine)] = EVERYONE
        :: else
        fi
    :: else -> mine = NONE
    fi
}

/* Nothing moves: the block goes back, and permissions with it (a peer that used one all the same is caught). */
inline take_back() {
    if
    :: mine != NONE ->
        b = BLOCK(me, mine);
        writers[b] = 0;
        readers[b] = 0;
        held[b] = 0;
        state[b] = (state[b] == IN_PLACE -> TENSOR : FREE)
    :: else
    fi
}

inline agree(what) {
    assert(outcome[n] == 0 || outcome[n] == what);
    outcome[n] = what
}

/* After publishing there is no way back: tell the peers, and never use again what they may still write to. */
inline poison() {
    assert(faulty || gives_up);
    if
    :: me == 0 && gives_up -> gives_up = 0; faulty = 1
    :: else
    fi;
    poisoned[me] = 1;
    for (i : 0 .. BLOCKS - 1) {
        b = BLOCK(me, i);
        if
#ifdef PLANT_NO_QUARANTINE
        :: state[b] == OFFERED -> state[b] = TENSOR
#else
        :: state[b] == OFFERED -> state[b] = QUARANTINED
#endif
        :: else
        fi
    }
}

inline job_over() {
    for (i : 0 .. RANKS - 1) { job_block[PAIR(me, i)] = 0 }
    job_seq[me] = 0;
    job_in_place[me] = 0;
    job[me] = NOTHING
}

inline call_over() {
    for (i : 0 .. RANKS - 1) { block[i] = 0 }
    n++;
    mine = NONE; failed = 0; is_small = 0; in_place = 0; small = 0; op = NOTHING
}

/* Copied out, or never to be: what nobody will copy again is cleared, which merges states that differ in it alone. */
inline take(slot) {
#ifndef PLANT_NO_CATCH_UP
    taken[slot]++;
    if
    :: taken[slot] == RANKS -> taken[slot] = 0; slot_block[slot] = 0; slot_failed[slot] = 0; slot_small[slot] = 0
    :: else
    fi
#else
    skip
#endif
}
