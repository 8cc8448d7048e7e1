-- affinity_counts: how often each entry of the vocabulary is routed to each expert.
-- One row per run, segment, kind, layer, expert and vocabulary entry with at least one such token. Tokens whose entry is
-- not known are left out.
-- Mergeable: counts of several segments add up.
select
    routing.run_id as run_id,
    routing.segment as segment,
    tokens.kind as kind,
    routing.layer as layer,
    routing.expert as expert,
    tokens.vocab_id as vocab_id,
    count(*)::bigint as tokens
from routing
join tokens
    on tokens.run_id = routing.run_id
    and tokens.segment = routing.segment
    and tokens.token_id = routing.token_id
where tokens.vocab_id is not null
group by
    routing.run_id,
    routing.segment,
    tokens.kind,
    routing.layer,
    routing.expert,
    tokens.vocab_id
