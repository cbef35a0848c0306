/*
 * The shared-memory protocol of one scale-up domain as a Promela model: 3 ranks, 3 operations.
 * README.md beside this file says what is modelled, what is not, and what the macros are for.
 *
 * Each rank is two processes: Rank (the caller: prepare, publish, rendezvous, second record) and
 * Mover (place and arrive, or pull and release). A synchronous call waits for its mover; with
 * -DASYNC=1 it may go on, so that rendezvous n+1 runs while rows of operation n still move.
 *
 * Access to a block is a permission, and memory rules are stated as permissions:
 *   writers[b]  ranks that may still place rows in b: granted by the offer, given back by the last write
 *   readers[b]  ranks that may still read b:          granted by the record, given back by the last read
 * Whoever writes asserts that nobody may read, whoever touches a tensor asserts that nobody may write.
 * These two, and the variables marked "ghost", exist only in the model.
 */

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

/* What ends a wait other than its condition. `gives_up` is the fault itself, the rest is its echo. */
#define ANY_POISON (poisoned[0] || poisoned[1] || poisoned[2])
#define ANY_DEAD (!alive[0] || !alive[1] || !alive[2])
#ifdef PLANT_DEAF
#define TROUBLE (me == 0 && gives_up)
#else
#define TROUBLE (ANY_POISON || ANY_DEAD || (me == 0 && gives_up))
#endif

/* A wait may look at its condition first or at its peers first: both are tried. */
#define WAIT(condition) if :: condition :: TROUBLE -> goto raise fi

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
byte taken[6];                       /* ghost: copies made; content that nobody will copy again is cleared */
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
    assert(faulty || gives_up || ANY_DEAD);
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

proctype Rank(byte me) {
    byte n, op, mine = NONE, drops, small, block[RANKS];
    bit failed, is_small, in_place;

    {
    n = 1;
next:
    /* End of the last call; the choices of user and input; then pick, write the slot, publish. */
    atomic {
        if
        :: job[me] == NOTHING && !poisoned[me]
        :: ASYNC
        :: TROUBLE -> goto raise
        fi;
        if
        :: n > OPS -> goto finish
        :: else
        fi;
        if
        :: ops[n] == NOTHING ->   /* the first rank to come here chooses for all */
            if
            :: ops[n] = DISPATCH
            :: CAN_COMBINE -> ops[n] = COMBINE
            :: BARRIERS -> ops[n] = BARRIER
            fi;
            if
            :: true
            :: (DEATH || INTERRUPT) && n > 1 -> drop_all[n] = 1
            fi
        :: else
        fi;
        op = ops[n];
#if DEATH || INTERRUPT
        drops = drop_all[n] * 3;
#else
        if
        :: true
        :: state[BLOCK(me, 0)] == TENSOR -> drops = 1
        :: state[BLOCK(me, 1)] == TENSOR -> drops = 2
        :: state[BLOCK(me, 0)] == TENSOR && state[BLOCK(me, 1)] == TENSOR -> drops = 3
        fi;
#endif
        if
        :: true
        :: may_fail > 0 -> may_fail--; failed = 1
        fi;
        if
        :: true
        :: op == DISPATCH && !failed && may_be_small > 0 -> may_be_small--; is_small = 1
        :: op == COMBINE && !failed && (state[BLOCK(me, 0)] == TENSOR || state[BLOCK(me, 1)] == TENSOR) ->
            in_place = 1
        fi;
        d_step {
            user_turn();
            drops = 0;
            prepare();
            assert(taken[SLOT(me, n)] == 0);
            slot_seq[SLOT(me, n)] = n;
            slot_block[SLOT(me, n)] = mine;
            slot_failed[SLOT(me, n)] = failed;
            slot_small[SLOT(me, n)] = is_small;
            record_seq[me] = n
        }
    }

#ifdef PLANT_FAILED_LEAVES
    if
    :: failed -> goto refused
    :: else
    fi;
#endif
    atomic {
        WAIT(ALL(record_seq, n));
        d_step {
            for (i : 0 .. RANKS - 1) {
                assert(slot_seq[SLOT(i, n)] == n);
                block[i] = slot_block[SLOT(i, n)];
                failed = failed || slot_failed[SLOT(i, n)];
                small = small | (slot_small[SLOT(i, n)] << i);
                taken[SLOT(i, n)]++;
                if
                :: taken[SLOT(i, n)] == RANKS ->
                    taken[SLOT(i, n)] = 0;
                    slot_block[SLOT(i, n)] = 0; slot_failed[SLOT(i, n)] = 0; slot_small[SLOT(i, n)] = 0
                :: else
                fi
            }
        }
        if
        :: failed -> goto refused
        :: !failed && !small -> goto move
        :: !failed && small
        fi;
        if
        :: small & BIT(me) ->
            /* The first offer was never written to: it is free again, but cannot be the larger one. */
            d_step {
                drops = mine;
                pick(mine, drops);
                if
                :: drops != NONE ->
                    state[BLOCK(me, drops)] = FREE;
                    writers[BLOCK(me, drops)] = 0
                :: else
                fi;
                drops = 0;
                offer(mine);
                second_of[me] = n;
                second_block[me] = mine;
                second_seq[me] = n
            }
        :: else
        fi
    }
    atomic {
        WAIT(SECOND_FROM(0, n) && SECOND_FROM(1, n) && SECOND_FROM(2, n));
        d_step {
            for (i : 0 .. RANKS - 1) {
                if
                :: small & BIT(i) ->
                    assert(second_of[i] == n);
                    block[i] = second_block[i];
                    failed = failed || (block[i] == NONE)
                :: else
                fi
            }
        }
        if
        :: failed -> goto refused
        :: else -> goto move
        fi
    }

move:
    atomic {
        if
        :: op == BARRIER ->
            d_step {
                agree(MOVED);
                call_over()
            };
            goto next
        :: else
        fi;
        /* Operations of one buffer move in call order. */
        WAIT(job[me] == NOTHING && !poisoned[me]);
        d_step {
            agree(MOVED);
            for (i : 0 .. RANKS - 1) {
                job_block[PAIR(me, i)] = block[i]
            }
            job_seq[me] = n;
            job_in_place[me] = in_place;
            job[me] = op;
            call_over()
        }
    }
    goto next;

refused:
    atomic {
        skip;
        d_step {
            agree(REFUSED);
            take_back();
            call_over()
        };
        goto next
    }

finish:
    atomic {
        WAIT(job[me] == NOTHING && !poisoned[me]);
        d_step { user_turn(); drops = 0; n = 0 };
        goto done
    }

raise:
    /* The error is out. The user owns all of its tensors again, y in place included, and may write them. */
    atomic {
        skip;
        d_step {
            poison();
            for (i : 0 .. BLOCKS - 1) {
                b = BLOCK(me, i);
                if
                :: state[b] == TENSOR || state[b] == IN_PLACE ->
                    assert(writers[b] == 0);
                    readers[b] = 0
                :: else
                fi
            };
            call_over();
            n = 0
        }
    };
done:
    atomic { skip }
    } unless { !alive[me] }
}

proctype Mover(byte me) {
    bit spoiled;

    {
end:
    do
    :: atomic { job[me] == DISPATCH ->
        d_step {
            for (i : 0 .. RANKS - 1) {
                b = BLOCK(i, job_block[PAIR(me, i)]);
                assert(writers[b] & BIT(me));
                assert(readers[b] == 0);
                assert(state[b] == OFFERED || state[b] == QUARANTINED);
                writers[b] = writers[b] & ~BIT(me)
            }
            arrive[PAIR(me, me)] = job_seq[me];
            arrive[PAIR(me, NEXT(1))] = job_seq[me]
        } }
        arrive[PAIR(me, NEXT(2))] = job_seq[me];
        atomic {
            WAIT(FROM_ALL(arrive, job_seq[me]));
            d_step {
                b = BLOCK(me, job_block[PAIR(me, me)]);
                assert(writers[b] == 0 && readers[b] == 0);
                if
                :: state[b] == OFFERED -> state[b] = TENSOR
                :: else -> assert(poisoned[me])
                fi;
                job_over()
            }
        }

    :: atomic { job[me] == COMBINE ->
        d_step {
            for (i : 0 .. RANKS - 1) {
                b = BLOCK(i, job_block[PAIR(me, i)]);
                if
                :: readers[b] & BIT(me) -> readers[b] = readers[b] & ~BIT(me)
                :: else -> spoiled = 1   /* taken away while this rank read: the user wrote there */
                fi
            }
        } ;
        STEP_WHERE_FAULTS
#ifndef PLANT_NO_LAST_LOOK
        /* No wait follows a pull of copied rows: without this look a spoiled result would be returned. */
        if
        :: ANY_POISON -> goto raise
        :: else
        fi;
#endif
        d_step {
            assert(!spoiled);
#ifndef PLANT_NO_RELEASE
            released[PAIR(me, me)] = job_seq[me];
            released[PAIR(me, NEXT(1))] = job_seq[me]
#endif
        } }
#ifndef PLANT_NO_RELEASE
        released[PAIR(me, NEXT(2))] = job_seq[me];
#endif
        atomic {
#ifndef PLANT_NO_RELEASE
            if
            :: !job_in_place[me] || FROM_ALL(released, job_seq[me])
            :: job_in_place[me] && TROUBLE -> goto raise
            fi;
#endif
            d_step {
                b = BLOCK(me, job_block[PAIR(me, me)]);
                if
                :: job_in_place[me] -> state[b] = TENSOR
                :: else
                fi;
                job_over()
            }
        }
    od;

raise:
    atomic {
        skip;
        d_step { poison(); spoiled = 0; job_over() }
    }
    } unless { !alive[me] }
}

#if DEATH
proctype Death() {
    if
    :: d_step { alive[0] = 0; faulty = 1 }
    :: skip
    fi
}
#endif

init {
    byte k;

    atomic {
        for (k : 0 .. RANKS - 1) { alive[k] = 1 }
        for (k : 0 .. RANKS - 1) {
            run Rank(k);
            run Mover(k)
        }
#if DEATH
        run Death()
#endif
    }
}
