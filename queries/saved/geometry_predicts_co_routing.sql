-- geometry_predicts_co_routing: whether experts with similar weights are chosen together.
-- One row per run that has a geometry (`moewh geometry`) and layer. Spearman's rank correlation, over the pairs of
-- experts, of the lift in co_routing with the similarity of the two experts:
--   router_cosine    cosine of their rows in the router
--   input_cosine     cosine of their flattened [gate; up]; output_cosine: of their flattened down projections
--   input_overlap    overlap of the subspaces they read; output_overlap: of those they write
-- 1: more similar experts are chosen together more often; 0: no relation; -1: less often.
-- Ties get the mean of their ranks. A pair that never shares a token has lift 0. An expert without tokens has no lift:
-- its pairs are left out; pairs counts the others. NULL if one side of the comparison does not vary (top-1 layers have no
-- pairs that share a token) or is not defined (a router without rows).
-- Parameters:
--   run (run): default every run.
with chosen_experts as (
    select
        run_id,
        layer,
        expert
    from expert_load
    where tokens > 0
        and (getvariable('run') is null or run_id = getvariable('run')::varchar)
),
pairs as (
    select
        expert_similarity.run_id as run_id,
        expert_similarity.layer as layer,
        router_similarity.cosine as router_cosine,
        expert_similarity.input_cosine as input_cosine,
        expert_similarity.output_cosine as output_cosine,
        expert_similarity.input_overlap as input_overlap,
        expert_similarity.output_overlap as output_overlap,
        coalesce(co_routing.lift, 0.0::double) as lift
    from expert_similarity
    join router_similarity
        on router_similarity.run_id = expert_similarity.run_id
        and router_similarity.layer = expert_similarity.layer
        and router_similarity.expert_a = expert_similarity.expert_a
        and router_similarity.expert_b = expert_similarity.expert_b
    join chosen_experts as chosen_a
        on chosen_a.run_id = expert_similarity.run_id
        and chosen_a.layer = expert_similarity.layer
        and chosen_a.expert = expert_similarity.expert_a
    join chosen_experts as chosen_b
        on chosen_b.run_id = expert_similarity.run_id
        and chosen_b.layer = expert_similarity.layer
        and chosen_b.expert = expert_similarity.expert_b
    left join co_routing
        on co_routing.run_id = expert_similarity.run_id
        and co_routing.layer = expert_similarity.layer
        and co_routing.expert_a = expert_similarity.expert_a
        and co_routing.expert_b = expert_similarity.expert_b
),
compared as (
    select run_id, layer, 'router_cosine' as measure, router_cosine as likeness, lift from pairs
    union all
    select run_id, layer, 'input_cosine' as measure, input_cosine as likeness, lift from pairs
    union all
    select run_id, layer, 'output_cosine' as measure, output_cosine as likeness, lift from pairs
    union all
    select run_id, layer, 'input_overlap' as measure, input_overlap as likeness, lift from pairs
    union all
    select run_id, layer, 'output_overlap' as measure, output_overlap as likeness, lift from pairs
),
defined as (
    select
        run_id,
        layer,
        measure,
        likeness,
        lift
    from compared
    where likeness is not null
),
ranked as (
    -- n equal values from rank k on have the mean rank k + (n - 1) / 2; the mean of all N ranks is (N + 1) / 2
    select
        run_id,
        layer,
        measure,
        (rank() over (partition by run_id, layer, measure order by likeness asc))::double
        + (count(*) over (partition by run_id, layer, measure, likeness) - 1)::double / 2
        - (count(*) over (partition by run_id, layer, measure) + 1)::double / 2 as likeness_rank,
        (rank() over (partition by run_id, layer, measure order by lift asc))::double
        + (count(*) over (partition by run_id, layer, measure, lift) - 1)::double / 2
        - (count(*) over (partition by run_id, layer, measure) + 1)::double / 2 as lift_rank
    from defined
),
correlated as (
    select
        run_id,
        layer,
        measure,
        sum(likeness_rank * lift_rank)
        / nullif(sqrt(sum(likeness_rank * likeness_rank) * sum(lift_rank * lift_rank)), 0) as correlation
    from ranked
    group by
        run_id,
        layer,
        measure
),
counted as (
    select
        run_id,
        layer,
        count(*)::bigint as pairs
    from pairs
    group by
        run_id,
        layer
)
select
    counted.run_id as run_id,
    counted.layer as layer,
    counted.pairs as pairs,
    max(case when correlated.measure = 'router_cosine' then correlated.correlation end) as router_cosine,
    max(case when correlated.measure = 'input_cosine' then correlated.correlation end) as input_cosine,
    max(case when correlated.measure = 'output_cosine' then correlated.correlation end) as output_cosine,
    max(case when correlated.measure = 'input_overlap' then correlated.correlation end) as input_overlap,
    max(case when correlated.measure = 'output_overlap' then correlated.correlation end) as output_overlap
from counted
left join correlated
    on correlated.run_id = counted.run_id
    and correlated.layer = counted.layer
group by
    counted.run_id,
    counted.layer,
    counted.pairs
order by run_id, layer
