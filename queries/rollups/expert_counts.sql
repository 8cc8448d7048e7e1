-- expert_counts: how many tokens of each kind and domain each expert gets.
-- One row per run, segment, kind, domain, layer and expert with at least one token.
-- Mergeable: counts and sums of several segments add up. weight_sum is NULL where no weight is known, and
-- first_choice_tokens where no rank is known.
select
    routing.run_id as run_id,
    routing.segment as segment,
    token_domains.kind as kind,
    token_domains.domain as domain,
    routing.layer as layer,
    routing.expert as expert,
    count(*)::bigint as tokens,
    sum(case when routing.rank = 0 then 1 when routing.rank > 0 then 0 end)::bigint as first_choice_tokens,
    sum(routing.weight::double) as weight_sum
from routing
join token_domains
    on token_domains.run_id = routing.run_id
    and token_domains.segment = routing.segment
    and token_domains.token_id = routing.token_id
group by
    routing.run_id,
    routing.segment,
    token_domains.kind,
    token_domains.domain,
    routing.layer,
    routing.expert
