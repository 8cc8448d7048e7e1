-- saliency_by_domain: how much each expert contributes to each domain, least first: the order of pruning for a domain.
-- One row per run, domain, layer and expert, for runs ingested with --expert-outputs; an expert that the domain never
-- chose has 0 choices and NULL means. NULL counts as a domain. Over tokens of kind prompt and generated of the domain, as
-- in expert_saliency:
--   mean_norm          = mean |f_i(x)|           EAN
--   mean_weighted_norm = mean w_i(x) |f_i(x)|    REAP (arXiv:2510.13999)
--   saliency_rank      = rank by mean_weighted_norm within domain and layer: 1 for the largest, never chosen experts last
-- A mean of few choices is unreliable: see choices. Counts come from a rollup, so the cost does not grow with tokens.
-- Parameters:
--   run (run): default every run.
--   domain (domain): default every domain.
--   layer (layer): default every layer.
with measured as (
    select
        run_id,
        domain,
        layer,
        expert,
        sum(choices)::bigint as choices,
        sum(norm_sum) as norm_sum,
        sum(weighted_norm_sum) as weighted_norm_sum
    from expert_output_counts
    where kind <> 'special'
        and (getvariable('run') is null or run_id = getvariable('run')::varchar)
        and (getvariable('domain') is null or domain = getvariable('domain')::varchar)
        and (getvariable('layer') is null or layer = getvariable('layer'))
    group by
        run_id,
        domain,
        layer,
        expert
),
domains as (
    select distinct
        run_id,
        domain,
        layer
    from measured
),
every_expert as (
    select
        domains.run_id as run_id,
        domains.domain as domain,
        domains.layer as layer,
        experts.expert as expert,
        coalesce(measured.choices, 0)::bigint as choices,
        measured.norm_sum / measured.choices::double as mean_norm,
        coalesce(measured.weighted_norm_sum, 0)::double as weighted_norm_sum,
        measured.weighted_norm_sum / measured.choices::double as mean_weighted_norm
    from domains
    join experts
        on experts.run_id = domains.run_id
        and experts.layer = domains.layer
    left join measured
        on measured.run_id = domains.run_id
        and measured.domain is not distinct from domains.domain
        and measured.layer = domains.layer
        and measured.expert = experts.expert
)
select
    run_id,
    domain,
    layer,
    expert,
    choices,
    mean_norm,
    weighted_norm_sum,
    mean_weighted_norm,
    (row_number() over (
        partition by run_id, domain, layer order by mean_weighted_norm desc nulls last, expert asc
    ))::integer as saliency_rank
from every_expert
order by run_id, domain, layer, saliency_rank desc
