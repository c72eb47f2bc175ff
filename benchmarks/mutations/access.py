"""Who may do what, and what is done once."""

from __future__ import annotations

from benchmarks.mutations.mutation import Mutation

DELIVER = "tests/integration/scheduler/test_deliver.py::"
DELIVER_FAULTS = "tests/integration/scheduler/test_deliver_faults.py::"
IDEMPOTENCY = "tests/integration/api/test_idempotency.py::"
ACCOUNTS = "tests/integration/api/test_accounts.py::"
DATASETS = "tests/integration/api/test_datasets.py::"
COSTS = "tests/integration/api/test_models_and_costs.py::"
MIRROR = "tests/unit/scheduler/test_mirror.py::"

ACCESS = (
    Mutation(
        "idempotency of the body",
        "another request gets the first one's answer",
        "control_plane/services/idempotency.py",
        "        if kept.body_sha256 != body:\n",
        "        if kept.body_sha256 is None:\n",
        (IDEMPOTENCY + "test_the_same_request_twice_is_one_job_and_another_body_a_conflict",),
    ),
    Mutation(
        "owner predicate",
        "a team sees another's objects",
        "control_plane/services/scope.py",
        "    query = select(entity).where(table.team_id == team_id)\n",
        "    query = select(entity)\n",
        (DATASETS + "test_somebody_elses_object_is_not_there",),
    ),
    Mutation(
        "team of a header",
        "a user acts in a team that is not his",
        "control_plane/auth.py",
        '    if role is None:\n        raise NotFound("Team not found")\n',
        "    role = role or TeamRole.MEMBER\n",
        (ACCOUNTS + "test_the_team_is_the_keys_else_the_headers_else_the_personal_one",),
    ),
    Mutation(
        "digest of an API key",
        "the beginning of a key is enough",
        "control_plane/services/keys.py",
        "    if found is None or not hmac.compare_digest(found[0].digest, digest(key)):\n",
        "    if found is None:\n",
        (ACCOUNTS + "test_a_revoked_or_expired_or_altered_key_is_nothing",),
    ),
    Mutation(
        "scope of an API key",
        "a key that may read may train",
        "control_plane/auth.py",
        "        if self.scope is not None and self.scope not in who.scopes:\n",
        "        if self.scope is not None and not who.scopes:\n",
        (ACCOUNTS + "test_scopes",),
    ),
    Mutation(
        "end of a session",
        "a session never expires",
        "control_plane/services/accounts.py",
        "                AuthSession.expires_at > now(),\n",
        "",
        (ACCOUNTS + "test_sessions_expire",),
    ),
    Mutation(
        "same site",
        "another site's form acts with our cookie",
        "control_plane/auth.py",
        "            _require_same_site(connection)\n",
        "",
        (ACCOUNTS + "test_the_cookie_serves_reads_and_needs_a_header_for_writes",),
    ),
    Mutation(
        "signature of a URL",
        "any URL of the object store serves",
        "control_plane/storage.py",
        "        return genuine and claims.get",
        "        return claims.get",
        (DATASETS + "test_a_signed_url_serves_its_one_purpose_and_only_in_time",),
    ),
    Mutation(
        "outbox dedupe",
        "an event that is told again is sent again",
        "control_plane/services/outbox.py",
        '        dedupe_key=f"{key}:{target}",\n',
        '        dedupe_key=f"{key}:{target}:{now()}",\n',
        (DELIVER + "test_an_event_is_told_once_however_often_it_is_repeated[sqlite]",),
    ),
    Mutation(
        "webhook signature",
        "a webhook is signed with something else than its secret",
        "control_plane/services/webhooks.py",
        '    signed = f"{message_id}.{timestamp}.".encode() + body\n',
        "    signed = body\n",
        ("tests/unit/control_plane/test_webhooks.py::test_an_independent_implementation_verifies_the_signature",),
    ),
    Mutation(
        "claim of a delivery",
        "a letter is carried by two at once",
        "scheduler/deliver.py",
        "        .where(Outbox.id == row_id, _is_due())\n",
        "        .where(Outbox.id == row_id)\n",
        (DELIVER_FAULTS + "test_a_row_is_claimed_by_one_of_several_deliverers[sqlite]",),
    ),
    Mutation(
        "notification dedupe",
        "people are told twice",
        "control_plane/services/notifications.py",
        '        "dedupe_key": dedupe_key,\n',
        '        "dedupe_key": __import__("uuid").uuid4().hex,\n',
        (COSTS + "test_owners_are_told_once_of_each_threshold",),
    ),
    Mutation(
        "mirrored seq",
        "two mirrors move it backwards",
        "scheduler/mirror.py",
        ".where(TrainingJob.id == job.id, TrainingJob.mirrored_seq == job.mirrored_seq)\n",
        ".where(TrainingJob.id == job.id)\n",
        (MIRROR + "test_a_mirror_that_was_overtaken_moves_nothing_back[sqlite]",),
    ),
    Mutation(
        "late note of a delivery",
        "who carried a letter too slowly undoes what the next noted",
        "scheduler/deliver.py",
        "Outbox.id == claim.row_id, Outbox.tries == claim.tries, ",
        "Outbox.id == claim.row_id, ",
        (DELIVER_FAULTS + "test_the_note_of_a_claim_that_ran_out_is_discarded[sqlite]",),
    ),
    Mutation(
        "environment of the child",
        "the trainer sees our secrets",
        "scheduler/cluster/child.py",
        "        **{name: parent[name] for name in INHERITED if name in parent},\n",
        "        **parent,\n",
        ("tests/unit/cluster/test_child.py::test_nothing_secret_passes",),
    ),
)
