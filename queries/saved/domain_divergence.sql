-- domain_divergence: how differently two domains, or languages, are routed at each layer.
-- One row per run, layer and ordered pair of different domains with tokens there (both orders). NULL is a domain of its
-- own. Over tokens of kind prompt and generated, p and q the experts' shares of the two domains' choices, m = (p + q) / 2:
--   divergence = sum of p_i log2(p_i / m_i) / 2 + sum of q_i log2(q_i / m_i) / 2     Jensen-Shannon, bits, 0 to 1
--   normalized = divergence / mean of the entropies of p and q, which makes layers with uneven load comparable
--   chance     = (E - k) / (8 k ln 2) * (1 / N_p + 1 / N_q)    expected bits of two samples of the same routing with N_p
--                and N_q tokens. Tokens of a prompt are correlated: divergence_confidence shuffles whole prompts instead.
--   weight_divergence, weight_normalized = the same for the experts' shares of the weights; NULL if not known,
--                or if an expert's weights sum to less than 0
-- Multilingual routing in MoE (arXiv:2510.04694) compares languages by the mean of the softmax over all experts, with an
-- entropy-normalised Jensen-Shannon divergence; here the weights are those of the chosen experts.
-- Counts come from a rollup, so the cost does not grow with tokens.
-- Parameters:
--   run (run): default every run.
--   layer (layer): default every layer.
with chosen as (
    select
        run_id,
        domain,
        layer,
        expert,
        sum(tokens)::double as tokens,
        sum(weight_sum) as weight_sum
    from expert_counts
    where kind <> 'special'
        and (getvariable('run') is null or run_id = getvariable('run')::varchar)
        and (getvariable('layer') is null or layer = getvariable('layer'))
    group by
        run_id,
        domain,
        layer,
        expert
),
totals as (
    select
        run_id,
        domain,
        layer,
        sum(tokens) as tokens,
        case when min(weight_sum) >= 0 then sum(weight_sum) end as weight_sum
    from chosen
    group by
        run_id,
        domain,
        layer
),
shares as (
    select
        totals.run_id as run_id,
        totals.domain as domain,
        totals.layer as layer,
        experts.expert as expert,
        totals.tokens as choices,
        coalesce(chosen.tokens, 0) / totals.tokens as share,
        case when chosen.tokens is null then 0::double else chosen.weight_sum end
        / nullif(totals.weight_sum, 0) as weight_share
    from totals
    join experts
        on experts.run_id = totals.run_id
        and experts.layer = totals.layer
    left join chosen
        on chosen.run_id = totals.run_id
        and chosen.domain is not distinct from totals.domain
        and chosen.layer = totals.layer
        and chosen.expert = experts.expert
),
paired as (
    select
        here.run_id as run_id,
        here.layer as layer,
        here.domain as domain,
        there.domain as other_domain,
        here.choices as choices,
        there.choices as other_choices,
        here.share as p,
        there.share as q,
        (here.share + there.share) / 2 as m,
        here.weight_share as v,
        there.weight_share as w,
        (here.weight_share + there.weight_share) / 2 as u
    from shares as here
    join shares as there
        on there.run_id = here.run_id
        and there.layer = here.layer
        and there.expert = here.expert
    where here.domain is distinct from there.domain
),
summed as (
    select
        run_id,
        layer,
        domain,
        other_domain,
        max(choices) as choices,
        max(other_choices) as other_choices,
        count(*) as experts,
        sum(coalesce(p * log2(nullif(p, 0) / m), 0) + coalesce(q * log2(nullif(q, 0) / m), 0)) / 2 as divergence,
        sum(coalesce(p * log2(1 / nullif(p, 0)), 0) + coalesce(q * log2(1 / nullif(q, 0)), 0)) / 2 as entropy,
        sum(case when u is not null then
            coalesce(v * log2(nullif(v, 0) / u), 0) + coalesce(w * log2(nullif(w, 0) / u), 0)
        end) / 2 as weight_divergence,
        sum(case when u is not null then
            coalesce(v * log2(1 / nullif(v, 0)), 0) + coalesce(w * log2(1 / nullif(w, 0)), 0)
        end) / 2 as weight_entropy
    from paired
    group by
        run_id,
        layer,
        domain,
        other_domain
)
select
    summed.run_id as run_id,
    summed.layer as layer,
    summed.domain as domain,
    summed.other_domain as other_domain,
    round(summed.choices / layers.top_k)::bigint as tokens,
    round(summed.other_choices / layers.top_k)::bigint as other_tokens,
    summed.divergence as divergence,
    summed.divergence / nullif(summed.entropy, 0) as normalized,
    (summed.experts - layers.top_k)::double / (8 * layers.top_k * ln(2))
    * (layers.top_k / summed.choices + layers.top_k / summed.other_choices) as chance,
    summed.weight_divergence as weight_divergence,
    summed.weight_divergence / nullif(summed.weight_entropy, 0) as weight_normalized
from summed
join layers
    on layers.run_id = summed.run_id
    and layers.layer = summed.layer
order by run_id, layer, domain, other_domain
