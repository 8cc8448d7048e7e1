-- expert_repetition: how often a token is routed like the token before it.
-- One row per run, domain and layer with at least one pair of adjacent tokens: positions p and p + 1 of one prompt and
-- context, both of kind prompt or generated, both with rows at the layer. NULL counts as a domain.
--   first_choice = share of pairs with the same first choice (rank 0)
--   any_choice   = share of pairs that share at least one expert
-- and both under random routing, where each token goes to k of E experts and all sets are equally likely:
--   first_choice_random = 1 / E
--   any_choice_random   = 1 - C(E - k, k) / C(E, k) = 1 - product over j < k of (E - k - j) / (E - j)
-- Mixtral (arXiv:2401.04088), Table 5, where with 8 experts and top-2 they are 12.5 % and 46 %. An uneven load alone
-- repeats more: independent first choices with this load agree with probability sum over experts of (N_i / N)^2.
-- A run whose ranks are not known (see runs.origin_format) has no first choices: first_choice is NULL.
-- Counts come from the rollup repetition_counts, so the cost does not grow with tokens.
create or replace view expert_repetition as
with pairs_of as (
    select
        repetition_counts.run_id as run_id,
        repetition_counts.domain as domain,
        repetition_counts.layer as layer,
        sum(repetition_counts.pairs)::bigint as pairs,
        sum(repetition_counts.first_choice_pairs)::bigint as first_choice_pairs,
        sum(repetition_counts.any_choice_pairs)::bigint as any_choice_pairs
    from repetition_counts
    group by
        repetition_counts.run_id,
        repetition_counts.domain,
        repetition_counts.layer
),
random_routing as (
    -- experts 0 to k - 1 are used as j; if E - k - j is not positive, two tokens always share an expert
    select
        layers.run_id as run_id,
        layers.layer as layer,
        1::double / layers.num_experts as first_choice,
        case
            when 2 * layers.top_k > layers.num_experts then 1::double
            else 1 - exp(sum(ln(
                nullif(greatest(layers.num_experts - layers.top_k - experts.expert, 0), 0)::double
                / (layers.num_experts - experts.expert)
            )))
        end as any_choice
    from layers
    join experts
        on experts.run_id = layers.run_id
        and experts.layer = layers.layer
        and experts.expert < layers.top_k
    group by
        layers.run_id,
        layers.layer,
        layers.num_experts,
        layers.top_k
)
select
    pairs_of.run_id as run_id,
    pairs_of.domain as domain,
    pairs_of.layer as layer,
    pairs_of.pairs as pairs,
    pairs_of.first_choice_pairs::double / nullif(pairs_of.pairs, 0) as first_choice,
    pairs_of.any_choice_pairs::double / nullif(pairs_of.pairs, 0) as any_choice,
    random_routing.first_choice as first_choice_random,
    random_routing.any_choice as any_choice_random
from pairs_of
join random_routing
    on random_routing.run_id = pairs_of.run_id
    and random_routing.layer = pairs_of.layer;

comment on view expert_repetition is 'One row per domain and layer: how often adjacent tokens choose the same experts, compared with random routing.';
comment on column expert_repetition.run_id is 'The run these rows belong to.';
comment on column expert_repetition.domain is 'Domain of the prompts; NULL counts as a domain.';
comment on column expert_repetition.layer is 'Layer index in the model.';
comment on column expert_repetition.pairs is 'Pairs of adjacent tokens within a prompt and context, both with rows at the layer.';
comment on column expert_repetition.first_choice is 'Share of pairs with the same first choice.';
comment on column expert_repetition.any_choice is 'Share of pairs that share at least one expert.';
comment on column expert_repetition.first_choice_random is 'first_choice under random routing: 1 / E.';
comment on column expert_repetition.any_choice_random is 'any_choice under random routing: 1 - C(E - k, k) / C(E, k).';
