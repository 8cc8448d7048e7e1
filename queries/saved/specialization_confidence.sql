-- specialization_confidence: how certain it is that a domain prefers an expert, with prompts, not tokens, as the sample.
-- One row per run, domain, layer and expert that gets at least min_share of the domain's tokens, most certain first.
-- share, overall_share and lift as in domain_specialization. The tokens of a prompt are correlated, so the standard error
-- of a share is that of a ratio over prompts: with n_p tokens of prompt p at the layer, n_pi of them to the expert, and P
-- prompts:
--   error^2 = P / (P - 1) * sum over prompts of (n_pi - share n_p)^2 / (sum of n_p)^2
--   lift_low, lift_high = (share -+ 1.96 error) / overall_share     95 % interval, for dozens of prompts or more
--   z = (share - share of all other prompts) / root of the sum of both errors squared; NULL for a single prompt
--   lift_a, lift_b = lift within two halves of the prompts, split deterministically within each domain: a real preference
--                    shows in both
-- By chance alone, 1 in 40 experts has lift_low above 1.
-- Reads the rows, so the cost grows with tokens: give run and layer.
-- Parameters:
--   min_share (share): default 0.1.
--   run (run): default every run.
--   layer (layer): default every layer.
with prompt_tokens as (
    select
        prompt_choices.run_id as run_id,
        prompt_choices.layer as layer,
        prompt_choices.domain as domain,
        prompt_choices.prompt_id as prompt_id,
        sum(prompt_choices.tokens)::double / layers.top_k as tokens
    from prompt_choices
    join layers
        on layers.run_id = prompt_choices.run_id
        and layers.layer = prompt_choices.layer
    group by
        prompt_choices.run_id,
        prompt_choices.layer,
        prompt_choices.domain,
        prompt_choices.prompt_id,
        layers.top_k
),
halves as (
    select
        run_id,
        prompt_id,
        row_number() over (
            partition by run_id, domain
            order by (prompt_id * 48271 + 11) % 2147483647 * ((prompt_id * 48271 + 11) % 2147483647) % 2147483647 asc, prompt_id asc
        ) % 2 as half
    from prompts
    where (getvariable('run') is null or run_id = getvariable('run')::varchar)
),
domain_sums as (
    select
        prompt_tokens.run_id as run_id,
        prompt_tokens.layer as layer,
        prompt_tokens.domain as domain,
        count(*) as prompts,
        sum(prompt_tokens.tokens) as tokens,
        sum(prompt_tokens.tokens * prompt_tokens.tokens) as squares,
        sum(case when halves.half = 1 then prompt_tokens.tokens else 0 end) as tokens_a
    from prompt_tokens
    join halves
        on halves.run_id = prompt_tokens.run_id
        and halves.prompt_id = prompt_tokens.prompt_id
    group by
        prompt_tokens.run_id,
        prompt_tokens.layer,
        prompt_tokens.domain
),
expert_sums as (
    select
        prompt_choices.run_id as run_id,
        prompt_choices.layer as layer,
        prompt_choices.domain as domain,
        prompt_choices.expert as expert,
        sum(prompt_choices.tokens)::double as chosen,
        sum(prompt_choices.tokens * prompt_choices.tokens)::double as chosen_squares,
        sum(prompt_choices.tokens * prompt_tokens.tokens) as products,
        sum(case when halves.half = 1 then prompt_choices.tokens else 0 end)::double as chosen_a
    from prompt_choices
    join prompt_tokens
        on prompt_tokens.run_id = prompt_choices.run_id
        and prompt_tokens.layer = prompt_choices.layer
        and prompt_tokens.prompt_id = prompt_choices.prompt_id
    join halves
        on halves.run_id = prompt_choices.run_id
        and halves.prompt_id = prompt_choices.prompt_id
    group by
        prompt_choices.run_id,
        prompt_choices.layer,
        prompt_choices.domain,
        prompt_choices.expert
),
all_domains as (
    select
        run_id,
        layer,
        sum(prompts) as prompts,
        sum(tokens) as tokens,
        sum(squares) as squares,
        sum(tokens_a) as tokens_a
    from domain_sums
    group by
        run_id,
        layer
),
all_experts as (
    select
        run_id,
        layer,
        expert,
        sum(chosen) as chosen,
        sum(chosen_squares) as chosen_squares,
        sum(products) as products,
        sum(chosen_a) as chosen_a
    from expert_sums
    group by
        run_id,
        layer,
        expert
),
gathered as (
    select
        expert_sums.run_id as run_id,
        expert_sums.layer as layer,
        expert_sums.domain as domain,
        expert_sums.expert as expert,
        domain_sums.prompts as prompts,
        domain_sums.tokens as tokens,
        domain_sums.squares as squares,
        domain_sums.tokens_a as tokens_a,
        expert_sums.chosen as chosen,
        expert_sums.chosen_squares as chosen_squares,
        expert_sums.products as products,
        expert_sums.chosen_a as chosen_a,
        expert_sums.chosen / domain_sums.tokens as share,
        all_experts.chosen / all_domains.tokens as overall_share,
        all_domains.tokens_a as all_tokens_a,
        all_experts.chosen_a as all_chosen_a,
        all_domains.tokens as all_tokens,
        all_experts.chosen as all_chosen,
        all_domains.prompts - domain_sums.prompts as other_prompts,
        all_domains.tokens - domain_sums.tokens as other_tokens,
        all_domains.squares - domain_sums.squares as other_squares,
        all_experts.chosen_squares - expert_sums.chosen_squares as other_chosen_squares,
        all_experts.products - expert_sums.products as other_products,
        (all_experts.chosen - expert_sums.chosen)
        / nullif(all_domains.tokens - domain_sums.tokens, 0) as other_share
    from expert_sums
    join domain_sums
        on domain_sums.run_id = expert_sums.run_id
        and domain_sums.layer = expert_sums.layer
        and domain_sums.domain is not distinct from expert_sums.domain
    join all_domains
        on all_domains.run_id = expert_sums.run_id
        and all_domains.layer = expert_sums.layer
    join all_experts
        on all_experts.run_id = expert_sums.run_id
        and all_experts.layer = expert_sums.layer
        and all_experts.expert = expert_sums.expert
),
deviations as (
    -- sums over prompts of (n_pi - share n_p)^2, expanded; what rounding leaves of a sum of zeros counts as zero below
    select
        run_id,
        domain,
        layer,
        expert,
        prompts,
        tokens,
        chosen,
        chosen_squares,
        share,
        overall_share,
        other_share,
        other_prompts,
        other_tokens,
        other_chosen_squares,
        tokens_a,
        chosen_a,
        all_tokens,
        all_chosen,
        all_tokens_a,
        all_chosen_a,
        chosen_squares - 2 * share * products + share * share * squares as residuals,
        other_chosen_squares - 2 * other_share * other_products
        + other_share * other_share * other_squares as other_residuals
    from gathered
),
errors as (
    select
        run_id,
        domain,
        layer,
        expert,
        prompts,
        chosen,
        share,
        overall_share,
        other_share,
        prompts::double / nullif(prompts - 1, 0)
        * case when residuals > 0.000000000001 * chosen_squares then residuals else 0 end
        / (tokens * tokens) as error_squared,
        other_prompts::double / nullif(other_prompts - 1, 0)
        * case when other_residuals > 0.000000000001 * other_chosen_squares then other_residuals else 0 end
        / nullif(other_tokens * other_tokens, 0) as other_error_squared,
        chosen_a * all_tokens_a / nullif(tokens_a * all_chosen_a, 0) as lift_a,
        (chosen - chosen_a) * (all_tokens - all_tokens_a)
        / nullif((tokens - tokens_a) * (all_chosen - all_chosen_a), 0) as lift_b
    from deviations
)
select
    run_id,
    domain,
    layer,
    expert,
    prompts::bigint as prompts,
    chosen::bigint as tokens,
    share,
    overall_share,
    share / overall_share as lift,
    (share - 1.96::double * sqrt(error_squared)) / overall_share as lift_low,
    (share + 1.96::double * sqrt(error_squared)) / overall_share as lift_high,
    (share - other_share) / nullif(sqrt(error_squared + other_error_squared), 0) as z,
    lift_a,
    lift_b
from errors
where share >= coalesce(getvariable('min_share')::double, 0.1) - 0.000000000001
order by run_id, domain, layer, round(lift_low, 9) desc, expert
