-- expert_output_counts: the norms of each expert's outputs and their cosines with the routed sum, by kind and domain.
-- One row per run, segment, kind, domain, layer and expert with at least one choice whose norm is known.
-- Mergeable: counts and sums of several segments add up, and the maximum of their max_norm is that of all segments. Only
-- runs ingested with --expert-outputs have rows.
select
    expert_outputs.run_id as run_id,
    expert_outputs.segment as segment,
    routing.kind as kind,
    routing.domain as domain,
    expert_outputs.layer as layer,
    expert_outputs.expert as expert,
    count(*)::bigint as choices,
    sum(expert_outputs.norm::double) as norm_sum,
    sum(routing.weight::double * expert_outputs.norm::double) as weighted_norm_sum,
    sum(expert_outputs.norm::double * expert_outputs.norm::double) as squared_norm_sum,
    max(expert_outputs.norm::double) as max_norm,
    count(expert_outputs.cosine)::bigint as cosines,
    sum(expert_outputs.cosine::double) as cosine_sum
from expert_outputs
join routing
    on routing.run_id = expert_outputs.run_id
    and routing.segment = expert_outputs.segment
    and routing.token_id = expert_outputs.token_id
    and routing.layer = expert_outputs.layer
    and routing.rank = expert_outputs.rank
where expert_outputs.norm is not null
group by
    expert_outputs.run_id,
    expert_outputs.segment,
    routing.kind,
    routing.domain,
    expert_outputs.layer,
    expert_outputs.expert
