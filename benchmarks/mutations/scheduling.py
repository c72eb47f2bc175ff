"""Fences, the state machine, checkpoints."""

from __future__ import annotations

from benchmarks.mutations.mutation import Mutation

LEASE = "tests/unit/scheduler/test_lease.py::"
STATES = "tests/unit/scheduler/test_states.py::"
LIFECYCLE = "tests/unit/scheduler/test_lifecycle.py::"
POLICY = "tests/unit/scheduler/test_policy.py::"
COLLECT = "tests/unit/scheduler/test_collect.py::"
LEDGER = "tests/unit/scheduler/test_ledger.py::"
WATCH = "tests/unit/cluster/test_watch.py::"
STAGING = "tests/unit/cluster/test_staging.py::"
LOOP = "tests/integration/scheduler/test_loop.py::"
FAULTS = "tests/integration/scheduler/test_faults.py::"
TROUBLES = "tests/integration/scheduler/test_troubles.py::"
RAY = "tests/contract/test_executor.py::"

FENCES = (
    Mutation(
        "lease check",
        "a superseded scheduler may write",
        "scheduler/lease.py",
        "            if epoch != self.epoch:\n",
        "            if epoch is None:\n",
        (COLLECT + "test_a_superseded_scheduler_stores_nothing[sqlite]",),
    ),
    Mutation(
        "lease time-out",
        "a holder that beats is superseded",
        "scheduler/lease.py",
        "        return time.monotonic() - self._sight.since >= self._timeout_s\n",
        "        return True\n",
        (LEASE + "test_a_holder_that_beats_is_not_superseded[sqlite]",),
    ),
    Mutation(
        "lease of the beat",
        "a superseded scheduler keeps the lease alive",
        "scheduler/lease.py",
        "                .where(SchedulerLease.id == 1, SchedulerLease.epoch == self.epoch)\n"
        "                .values(beat=",
        "                .where(SchedulerLease.id == 1)\n                .values(beat=",
        (LEASE + "test_a_beat_that_stands_still_is_superseded_and_the_old_holder_is_fenced[sqlite]",),
    ),
    Mutation(
        "attempt check of a transition",
        "an old attempt moves the job",
        "control_plane/services/lifecycle.py",
        "        guard.append(table.attempt == attempt)\n",
        "        guard.append(table.id == work.id)\n",
        (LIFECYCLE + "test_another_attempt_changes_nothing[sqlite]",),
    ),
    Mutation(
        "attempt check of a claim",
        "events of an old attempt are stored",
        "scheduler/finish.py",
        "    if work.attempt != attempt.number or work.status not in ACTIVE:\n",
        "    if work.status not in ACTIVE:\n",
        (COLLECT + "test_an_attempt_that_is_not_the_current_one_changes_nothing[sqlite]",),
    ),
    Mutation(
        "cursor compare-and-set",
        "a batch is stored again",
        "scheduler/finish.py",
        "        guard.append(Attempt.event_cursor == cursor)\n",
        "",
        (COLLECT + "test_the_same_batch_again_changes_nothing[sqlite]",),
    ),
    Mutation(
        "epoch fence of the supervisor",
        "a supervisor obeys a superseded scheduler",
        "scheduler/cluster/supervisor.py",
        "        if epoch < self._epoch:\n",
        "        if epoch < 0:\n",
        (RAY + "test_an_older_scheduler_is_refused[ray]",),
    ),
    Mutation(
        "unique event",
        "the database takes an event of an attempt twice",
        "control_plane/tables/runs.py",
        '(UniqueConstraint("job_id", "seq"), UniqueConstraint("attempt_id", "number"))',
        '(UniqueConstraint("job_id", "seq"),)',
        (LIFECYCLE + "test_the_database_takes_an_event_of_an_attempt_once[sqlite]",),
    ),
    Mutation(
        "unique usage",
        "the database takes two counts of the same GPU time",
        "control_plane/tables/runs.py",
        '    __table_args__ = (UniqueConstraint("attempt_id", "rank", "kind"),)\n',
        "",
        (LEDGER + "test_the_database_counts_each_kind_of_a_rank_once[sqlite]",),
    ),
)

STATE_MACHINE = (
    Mutation(
        "terminal guard",
        "what has ended moves again",
        "control_plane/services/lifecycle.py",
        "    guard = [table.id == work.id, table.status.in_(sources(target))]\n",
        "    guard = [table.id == work.id]\n",
        (LIFECYCLE + "test_every_pair_moves_or_not_as_the_machine_says[sqlite]",),
    ),
    Mutation(
        "terminal states",
        "a cancelled job may be queued",
        "control_plane/states.py",
        "    S.CANCELLED: frozenset(),\n",
        "    S.CANCELLED: frozenset({S.QUEUED}),\n",
        (STATES + "test_every_pair_is_legal_or_not_as_the_table_says",),
    ),
    Mutation(
        "stop strength",
        "a pause overrides a cancel",
        "control_plane/services/lifecycle.py",
        "StopReason.PAUSE, StopReason.CANCEL)",
        "StopReason.CANCEL, StopReason.PAUSE)",
        (LIFECYCLE + "test_the_stronger_stop_wins",),
    ),
    Mutation(
        "retry limit",
        "a job that is lost again and again is tried forever",
        "control_plane/states.py",
        "            if faults > MAX_FAULT_RETRIES:\n",
        "            if faults > 1_000:\n",
        (FAULTS + "test_after_too_many_faults_the_job_fails[sqlite]",),
    ),
    Mutation(
        "adapter of a completed job",
        "a job without an adapter is complete",
        "scheduler/finish.py",
        ' and "adapter" not in (work.result or {}):\n',
        " and work.result is ...:\n",
        (FAULTS + "test_completion_without_an_adapter_is_a_fault[sqlite]",),
    ),
    Mutation(
        "unknown is not dead",
        "an unreachable supervisor is declared dead",
        "scheduler/policy.py",
        "    if not look.reachable or liveness is Liveness.UNKNOWN:\n",
        "    liveness = Liveness.DEAD if liveness is Liveness.UNKNOWN else liveness\n    if not look.reachable:\n",
        (POLICY + "test_unknown_is_not_dead",),
    ),
    Mutation(
        "stray reaping",
        "supervisors that belong to nothing stay",
        "scheduler/policy.py",
        "_strays(snapshot)",
        "[]",
        (POLICY + "test_supervisors_that_belong_to_nothing_are_released",),
    ),
    Mutation(
        "capacity of what is not released",
        "GPUs are given away while an ended attempt may hold them",
        "scheduler/policy.py",
        "            if held.demand is not None:\n                self.take(held.demand)\n",
        "            if held.demand is not None and not held.ended:\n                self.take(held.demand)\n",
        (POLICY + "test_what_an_ended_attempt_has_not_released_is_not_free",),
    ),
    Mutation(
        "one attempt at a time",
        "the next attempt begins while the last may train on",
        "scheduler/policy.py",
        "    if work.work_id in snapshot.unreleased:\n",
        "    if work.work_id in ():\n",
        (POLICY + "test_while_an_attempt_may_hold_something_yet_the_next_waits_and_says_why",),
    ),
    Mutation(
        "end before the books are closed",
        "what is given up trains on, and nobody counts it",
        "scheduler/collect.py",
        "        await self.release(name)\n",
        "",
        (TROUBLES + "test_what_is_given_up_is_ended_before_the_next_begins[sqlite]",),
    ),
    Mutation(
        "the database's own trouble",
        "a healthy attempt is given up while PostgreSQL starts",
        "control_plane/db.py",
        ' or type(error).__module__.startswith("asyncpg."):\n',
        ":\n",
        (TROUBLES + "test_a_database_that_is_starting_up_ends_no_attempt[sqlite]",),
    ),
    Mutation(
        "nobody is overtaken",
        "small jobs keep a gang waiting forever",
        "scheduler/policy.py",
        "                self._wanted.update(wanted)\n",
        "",
        (POLICY + "test_a_gang_is_not_overtaken_by_those_behind_it",),
    ),
    Mutation(
        "hang deadline",
        "a hung training goes on",
        "scheduler/cluster/watch.py",
        "        late = [found for found in (unresponsive, hung) if found.by_s > 0]\n",
        "        late = [found for found in (unresponsive,) if found.by_s > 0]\n",
        (WATCH + "test_hung_after_the_floor_when_steps_are_short",),
    ),
    Mutation(
        "grace of a stop",
        "a child that does not stop is waited for",
        "scheduler/cluster/watch.py",
        "        late = [found for found in (unresponsive, hung) if found.by_s > 0]\n",
        "        late = [found for found in (hung,) if found.by_s > 0]\n",
        (WATCH + "test_whoever_is_deaf_has_the_grace_in_any_phase",),
    ),
    Mutation(
        "verdict before its end",
        "a report counts although its child failed",
        "scheduler/collect.py",
        "        batch = _held_back(batch)\n",
        "",
        (LOOP + "test_a_verdict_makes_its_dataset_ready_in_one_step[sqlite]",),
    ),
    Mutation(
        "node time-out",
        "an attempt is declared dead while its old nodes may run on",
        "scheduler/policy.py",
        "    if snapshot.known_s < snapshot.node_timeout_s:\n",
        "    if snapshot.known_s < 0:\n",
        (POLICY + "test_nodes_may_outlive_their_cluster_for_a_while",),
    ),
    Mutation(
        "pause after a fault",
        "a lost job is tried again at once",
        "scheduler/policy.py",
        "now < work.not_before <= now + LONGEST_PAUSE:\n",
        "now > work.not_before + LONGEST_PAUSE:\n",
        (POLICY + "test_what_stands_in_the_way_is_said",),
    ),
    Mutation(
        "retry of what has ended",
        "a running job is retried",
        "control_plane/services/retries.py",
        "    if old.status not in RETRIED:\n",
        "    if old.status is Status.COMPLETED:\n",
        ("tests/integration/api/test_lifecycle.py::test_every_status_and_action[sqlite-retry]",),
    ),
)

CHECKPOINTS = (
    Mutation(
        "manifest of a checkpoint on disk",
        "a torn checkpoint is resumed from",
        "trainer/checkpoint.py",
        "            if _measure(folder / name) != entry:\n",
        "            if not (folder / name).exists():\n",
        ("tests/unit/trainer/test_checkpoint.py::test_a_torn_checkpoint_is_never_read",),
    ),
    Mutation(
        "manifest of a stored checkpoint",
        "a checkpoint with another manifest than recorded is resumed from",
        "scheduler/cluster/staging.py",
        "        if hashlib.sha256(manifest).hexdigest() != point.sha256:\n",
        "        if not manifest:\n",
        (STAGING + "test_another_checkpoint_in_its_place_is_torn",),
    ),
    Mutation(
        "files of a stored checkpoint",
        "a checkpoint with a damaged file is resumed from",
        "scheduler/cluster/staging.py",
        'await asyncio.to_thread(sha256_of, path) != entry["sha256"]:\n',
        'entry["sha256"] == "":\n',
        (STAGING + "test_a_torn_checkpoint_is_known",),
    ),
    Mutation(
        "manifest last",
        "a checkpoint looks whole before it is",
        "scheduler/cluster/staging.py",
        "key=lambda path: (path.name == MANIFEST, path)",
        "key=lambda path: (path.name != MANIFEST, path)",
        (STAGING + "test_an_outage_is_waited_out_and_the_manifest_goes_last",),
    ),
    Mutation(
        "retention of the best",
        "the best checkpoint is deleted",
        "scheduler/retention.py",
        " if not checkpoint.best]",
        "]",
        (LOOP + "test_the_last_two_checkpoints_and_the_best_stay[sqlite]",),
    ),
)
