-- expert_saliency: how much each expert contributes, by the measures that pruning methods rank experts by.
-- One row per run, layer and expert, for runs ingested with --expert-outputs; an expert never chosen has 0 choices.
-- Over tokens of kind prompt and generated: X_i the n_i choices of expert i, f_i(x) its output before the weight w_i(x):
--   norm_sum           = sum over X_i of |f_i(x)|
--   mean_norm          = norm_sum / n_i                             EAN; MAN of Liu et al. (arXiv:2606.15716)
--   weighted_norm_sum  = sum over X_i of w_i(x) |f_i(x)|
--   mean_weighted_norm = weighted_norm_sum / n_i                    REAP (arXiv:2510.13999), the saliency S_i
--   mean_squared_norm  = sum over X_i of |f_i(x)|^2 / n_i           MSAN of Liu et al.
--   mean_cosine        = mean over X_i of cos(f_i(x), sum_j w_j(x) f_j(x)): 1 if the output is parallel to the layer's sum
-- Each measure has its rank within the layer: 1 for the largest, never chosen experts last, ties by expert index. So
-- the m least salient of E experts are those with a rank above E - m.
-- Choices whose output is not finite are left out. Counts come from a rollup, so the cost does not grow with tokens.
create or replace view expert_saliency as
with measured as (
    select
        expert_output_counts.run_id as run_id,
        expert_output_counts.layer as layer,
        expert_output_counts.expert as expert,
        sum(expert_output_counts.choices)::bigint as choices,
        sum(expert_output_counts.norm_sum) as norm_sum,
        sum(expert_output_counts.weighted_norm_sum) as weighted_norm_sum,
        sum(expert_output_counts.squared_norm_sum) as squared_norm_sum,
        max(expert_output_counts.max_norm) as max_norm,
        sum(expert_output_counts.cosine_sum) / nullif(sum(expert_output_counts.cosines), 0)::double as mean_cosine
    from expert_output_counts
    where expert_output_counts.kind <> 'special'
    group by
        expert_output_counts.run_id,
        expert_output_counts.layer,
        expert_output_counts.expert
),
every_expert as (
    select
        experts.run_id as run_id,
        experts.layer as layer,
        experts.expert as expert,
        coalesce(measured.choices, 0)::bigint as choices,
        coalesce(measured.norm_sum, 0)::double as norm_sum,
        measured.norm_sum / measured.choices::double as mean_norm,
        coalesce(measured.weighted_norm_sum, 0)::double as weighted_norm_sum,
        measured.weighted_norm_sum / measured.choices::double as mean_weighted_norm,
        measured.squared_norm_sum / measured.choices::double as mean_squared_norm,
        measured.max_norm as max_norm,
        measured.mean_cosine as mean_cosine
    from experts
    join (select distinct measured.run_id as run_id from measured) as asked
        on asked.run_id = experts.run_id
    left join measured
        on measured.run_id = experts.run_id
        and measured.layer = experts.layer
        and measured.expert = experts.expert
)
select
    run_id,
    layer,
    expert,
    choices,
    norm_sum,
    mean_norm,
    weighted_norm_sum,
    mean_weighted_norm,
    mean_squared_norm,
    max_norm,
    mean_cosine,
    (row_number() over (
        partition by run_id, layer order by choices desc, expert asc
    ))::integer as choices_rank,
    (row_number() over (
        partition by run_id, layer order by norm_sum desc, expert asc
    ))::integer as norm_sum_rank,
    (row_number() over (
        partition by run_id, layer order by mean_norm desc nulls last, expert asc
    ))::integer as mean_norm_rank,
    (row_number() over (
        partition by run_id, layer order by weighted_norm_sum desc, expert asc
    ))::integer as weighted_norm_sum_rank,
    (row_number() over (
        partition by run_id, layer order by mean_weighted_norm desc nulls last, expert asc
    ))::integer as mean_weighted_norm_rank,
    (row_number() over (
        partition by run_id, layer order by mean_squared_norm desc nulls last, expert asc
    ))::integer as mean_squared_norm_rank
from every_expert;

comment on view expert_saliency is 'One row per layer and expert of a run with expert outputs: the measures that pruning methods use, each with its rank.';
comment on column expert_saliency.run_id is 'The run these rows belong to.';
comment on column expert_saliency.layer is 'Layer index in the model.';
comment on column expert_saliency.expert is '0-based expert index within the layer.';
comment on column expert_saliency.choices is 'n_i: choices of this expert whose norm is known; 0 if it was never chosen.';
comment on column expert_saliency.norm_sum is 'Sum of the norms of its outputs, before weighting.';
comment on column expert_saliency.mean_norm is 'norm_sum / choices (EAN); NULL for an expert never chosen.';
comment on column expert_saliency.weighted_norm_sum is 'Sum of weight * norm over its choices.';
comment on column expert_saliency.mean_weighted_norm is 'weighted_norm_sum / choices (REAP); NULL for an expert never chosen.';
comment on column expert_saliency.mean_squared_norm is 'Mean of the squared norms (MSAN); NULL for an expert never chosen.';
comment on column expert_saliency.max_norm is 'The largest norm of its outputs; NULL for an expert never chosen.';
comment on column expert_saliency.mean_cosine is 'Mean cosine of its output with the routed sum of the token; NULL for an expert never chosen.';
comment on column expert_saliency.choices_rank is 'Rank by choices among the layer''s experts: 1 for the largest.';
comment on column expert_saliency.norm_sum_rank is 'Rank by norm_sum: 1 for the largest.';
comment on column expert_saliency.mean_norm_rank is 'Rank by mean_norm: 1 for the largest; experts never chosen come last.';
comment on column expert_saliency.weighted_norm_sum_rank is 'Rank by weighted_norm_sum: 1 for the largest.';
comment on column expert_saliency.mean_weighted_norm_rank is 'Rank by mean_weighted_norm: 1 for the largest; experts never chosen come last.';
comment on column expert_saliency.mean_squared_norm_rank is 'Rank by mean_squared_norm: 1 for the largest; experts never chosen come last.';
