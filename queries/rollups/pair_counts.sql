-- pair_counts: how many tokens of each kind and domain two experts of a layer share.
-- One row per run, segment, kind, domain, layer and pair expert_a < expert_b that shares at least one token.
-- Mergeable: counts of several segments add up. A layer with one expert per token has no pairs.
select
    a.run_id as run_id,
    a.segment as segment,
    a.kind as kind,
    a.domain as domain,
    a.layer as layer,
    a.expert as expert_a,
    b.expert as expert_b,
    count(*)::bigint as tokens
from routing as a
join routing as b
    on b.run_id = a.run_id
    and b.segment = a.segment
    and b.token_id = a.token_id
    and b.layer = a.layer
    and b.expert > a.expert
group by
    a.run_id,
    a.segment,
    a.kind,
    a.domain,
    a.layer,
    a.expert,
    b.expert
