-- affinity_counts: how often each entry of the vocabulary is routed to each expert.
-- One row per run, segment, kind, layer, expert and vocabulary entry with at least one token. Tokens whose entry is not
-- known are left out.
-- Mergeable: counts of several segments add up.
select
    routing.run_id as run_id,
    routing.segment as segment,
    routing.kind as kind,
    routing.layer as layer,
    routing.expert as expert,
    routing.vocab_id as vocab_id,
    count(*)::bigint as tokens
from routing
where routing.vocab_id is not null
group by
    routing.run_id,
    routing.segment,
    routing.kind,
    routing.layer,
    routing.expert,
    routing.vocab_id
