-- expert_counts: how many tokens of each kind and domain each expert gets.
-- One row per run, segment, kind, domain, layer and expert with at least one token.
-- Mergeable: counts and sums of several segments add up. weight_sum is NULL if no weight is known, and
-- first_choice_tokens if no rank is known.
select
    routing.run_id as run_id,
    routing.segment as segment,
    routing.kind as kind,
    routing.domain as domain,
    routing.layer as layer,
    routing.expert as expert,
    count(*)::bigint as tokens,
    sum(case when routing.rank = 0 then 1 when routing.rank > 0 then 0 end)::bigint as first_choice_tokens,
    sum(routing.weight::double) as weight_sum
from routing
group by
    routing.run_id,
    routing.segment,
    routing.kind,
    routing.domain,
    routing.layer,
    routing.expert
