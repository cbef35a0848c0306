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

#include "state.pml"

proctype Rank(byte me) {
    byte n, op, mine = NONE, drops, small, block[RANKS];
    bit failed, is_small, in_place, behind;

    {
    n = 1;
next:
    /* End of the last call; the choices of user and input; then pick, write the slot, publish. */
    atomic {
        WAIT(ASYNC || MOVER_IDLE, 0);
#ifndef PLANT_NO_CATCH_UP
        if
        :: !behind || n > OPS
        :: behind && n <= OPS && TROUBLE(record_seq[0] < n - 1) -> goto raise
        :: behind && n <= OPS && ALL(record_seq, n - 1) ->
            d_step {
                for (i : 0 .. RANKS - 1) { take(SLOT(i, n - 1)) }
                behind = 0
            }
        fi;
#endif
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
            NOT_WANTED(SLOT(me, n));
            slot_seq[SLOT(me, n)] = n;
            slot_block[SLOT(me, n)] = mine;
            slot_failed[SLOT(me, n)] = failed;
            slot_small[SLOT(me, n)] = is_small;
            record_seq[me] = n
        };
        /* Whoever refuses its own input leaves at once, and catches up before it writes a slot again. */
        if
        :: failed -> behind = 1; goto refused
        :: else
        fi
    }

    atomic {
        WAIT(ALL(record_seq, n), record_seq[0] < n);
        d_step {
            for (i : 0 .. RANKS - 1) {
                assert(slot_seq[SLOT(i, n)] == n);
                block[i] = slot_block[SLOT(i, n)];
                failed = failed || slot_failed[SLOT(i, n)];
                small = small | (slot_small[SLOT(i, n)] << i);
                take(SLOT(i, n))
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
        WAIT(SECOND_FROM(0, n) && SECOND_FROM(1, n) && SECOND_FROM(2, n), !SECOND_FROM(0, n));
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
        WAIT(MOVER_IDLE, 0);
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
        WAIT(MOVER_IDLE, 0);
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
            WAIT(FROM_ALL(arrive, job_seq[me]), arrive[PAIR(0, me)] < job_seq[me]);
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
            :: job_in_place[me] && TROUBLE(released[PAIR(0, me)] < job_seq[me]) -> goto raise
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
