-- outputs_by_rank: whether larger weights go with larger outputs, and how the outputs align with the routed sum.
-- One row per run, layer and choice (0 for a token's largest weight), for runs ingested with --expert-outputs. Over
-- tokens of kind prompt and generated whose norms at the layer are all known:
--   mean_norm         = mean |f(x)| of the experts with this choice, before weighting
--   mean_norm_rank    = mean rank of that norm among the token's k norms, 1 for the largest: rank of output norms against
--                       rank of scores (A Closer Look into MoE, arXiv:2406.18219). (k + 1) / 2 if weight and norm are
--                       independent. Equal norms, as of identity experts, get the mean of their ranks
--   mean_cosine       = mean cosine of f(x) with the routed sum; choice 0 is that of MoE Lens (arXiv:2603.05806)
--   orthogonal_cosine = its value if the token's k outputs were orthogonal: w |f| / sqrt(sum of w^2 |f|^2)
-- Reads the rows of expert_outputs and routing, so the cost grows with tokens: give run and layer.
-- Parameters:
--   run (run): default every run.
--   domain (domain): default every domain.
--   layer (layer): default every layer.
with outputs as (
    select
        expert_outputs.run_id as run_id,
        expert_outputs.layer as layer,
        expert_outputs.token_id as token_id,
        expert_outputs.rank as choice,
        expert_outputs.norm::double as norm,
        expert_outputs.cosine::double as cosine,
        routing.weight::double as weight
    from expert_outputs
    join routing
        on routing.run_id = expert_outputs.run_id
        and routing.segment = expert_outputs.segment
        and routing.token_id = expert_outputs.token_id
        and routing.layer = expert_outputs.layer
        and routing.rank = expert_outputs.rank
    where routing.kind <> 'special'
        and (getvariable('run') is null or expert_outputs.run_id = getvariable('run')::varchar)
        and (getvariable('domain') is null or routing.domain = getvariable('domain')::varchar)
        and (getvariable('layer') is null or expert_outputs.layer = getvariable('layer'))
),
within_token as (
    select
        run_id,
        layer,
        choice,
        weight,
        norm,
        cosine,
        -- n equal norms from rank r on have the mean rank r + (n - 1) / 2
        (rank() over (partition by run_id, token_id, layer order by norm desc))::double
        + (count(*) over (partition by run_id, token_id, layer, norm) - 1)::double / 2 as norm_rank,
        sqrt(sum(weight * weight * norm * norm) over (partition by run_id, token_id, layer)) as together,
        sum(case when norm is null then 1 else 0 end) over (partition by run_id, token_id, layer) as unknown
    from outputs
)
select
    run_id,
    layer,
    choice,
    count(*)::bigint as choices,
    avg(weight) as mean_weight,
    avg(norm) as mean_norm,
    avg(norm_rank) as mean_norm_rank,
    avg(cosine) as mean_cosine,
    avg(weight * norm / nullif(together, 0)) as orthogonal_cosine
from within_token
where unknown = 0
group by
    run_id,
    layer,
    choice
order by run_id, layer, choice
