-- expert_load: how many tokens each expert gets, and with what weight.
-- One row per run, layer and expert; an expert that was never chosen has 0 tokens.
-- Over tokens of kind prompt and generated with rows at the layer, N_i of them routed to expert i:
--   share       = N_i / sum of N_i over the layer's experts (NULL if the layer has no tokens)
--   mean_weight = weight_sum / N_i           (NULL for an expert never chosen)
-- In imported runs, first_choice_tokens is NULL if no rank is known, and weight_sum and mean_weight if no weight is.
create or replace view expert_load as
with chosen as (
    select
        expert_counts.run_id as run_id,
        expert_counts.layer as layer,
        expert_counts.expert as expert,
        sum(expert_counts.tokens)::bigint as tokens,
        sum(expert_counts.first_choice_tokens)::bigint as first_choice_tokens,
        sum(expert_counts.weight_sum) as weight_sum
    from expert_counts
    where expert_counts.kind <> 'special'
    group by
        expert_counts.run_id,
        expert_counts.layer,
        expert_counts.expert
)
select
    experts.run_id as run_id,
    experts.layer as layer,
    experts.expert as expert,
    coalesce(chosen.tokens, 0)::bigint as tokens,
    coalesce(chosen.tokens, 0)::double
    / nullif(sum(chosen.tokens) over (partition by experts.run_id, experts.layer), 0) as share,
    coalesce(
        chosen.first_choice_tokens,
        case
            when sum(chosen.tokens) over (partition by experts.run_id, experts.layer) is null
                or sum(chosen.first_choice_tokens) over (partition by experts.run_id, experts.layer) is not null then 0
        end
    )::bigint as first_choice_tokens,
    case when chosen.tokens is null then 0::double else chosen.weight_sum end as weight_sum,
    chosen.weight_sum / nullif(chosen.tokens, 0) as mean_weight
from experts
left join chosen
    on chosen.run_id = experts.run_id
    and chosen.layer = experts.layer
    and chosen.expert = experts.expert;

comment on view expert_load is 'One row per layer and expert: how many tokens it gets and with what weight; unused experts have 0.';
comment on column expert_load.run_id is 'The run these rows belong to.';
comment on column expert_load.layer is 'Layer index in the model.';
comment on column expert_load.expert is '0-based expert index within the layer.';
comment on column expert_load.tokens is 'N_i: tokens routed to this expert.';
comment on column expert_load.share is 'N_i / sum of N_i: share of the layer''s choices; sums to 1 over its experts.';
comment on column expert_load.first_choice_tokens is 'Tokens whose largest weight is this expert''s (rank 0).';
comment on column expert_load.weight_sum is 'Sum of this expert''s weights; NULL if weights are not known.';
comment on column expert_load.mean_weight is 'weight_sum / tokens; NULL for an expert never chosen.';
