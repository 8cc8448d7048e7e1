-- routing_copies: the values that a routing row copies from its token (vocab_id, kind), prompt (id, domain) and run
-- (vocabulary_key) are equal to the originals.
-- One row per run, segment, token and layer where they differ. known_tokens reports rows whose token is missing.
-- Parameters:
--   run (run): default every run.
select distinct
    routing.run_id as run_id,
    routing.segment as segment,
    routing.token_id as token_id,
    routing.layer as layer
from routing
join token_domains
    on token_domains.run_id = routing.run_id
    and token_domains.segment = routing.segment
    and token_domains.token_id = routing.token_id
join runs
    on runs.run_id = routing.run_id
where (getvariable('run') is null or routing.run_id = getvariable('run')::varchar)
    and (
        routing.vocab_id is distinct from token_domains.vocab_id
        or routing.kind is distinct from token_domains.kind
        or routing.prompt_id is distinct from token_domains.prompt_id
        or routing.domain is distinct from token_domains.domain
        or routing.vocabulary_key is distinct from runs.vocabulary_key
    )
