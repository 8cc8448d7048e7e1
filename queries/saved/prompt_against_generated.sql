-- prompt_against_generated: which experts generated tokens use more, or less, than the tokens of prompts.
-- One row per run, layer and expert, for runs and layers with tokens of both kinds; largest difference first. Of each
-- kind's tokens with rows at the layer, share is the share that is routed to the expert: over experts it sums to top_k:
--   difference = generated_share - prompt_share
--   z          = difference / its standard error if both kinds are routed identically. Tokens of one prompt are
--                correlated, which makes z too large: read it as an upper bound.
-- Special tokens are left out. Counts come from a rollup, so the cost does not grow with tokens.
-- Parameters:
--   run (run): default every run.
--   layer (layer): default every layer.
with chosen as (
    select
        run_id,
        layer,
        expert,
        sum(case when kind = 'prompt' then tokens else 0 end)::bigint as prompt_choices,
        sum(case when kind = 'generated' then tokens else 0 end)::bigint as generated_choices
    from expert_counts
    where kind in ('prompt', 'generated')
        and (getvariable('run') is null or run_id = getvariable('run')::varchar)
        and (getvariable('layer') is null or layer = getvariable('layer'))
    group by
        run_id,
        layer,
        expert
),
counted as (
    select
        experts.run_id as run_id,
        experts.layer as layer,
        experts.expert as expert,
        coalesce(chosen.prompt_choices, 0)::bigint as prompt_choices,
        coalesce(chosen.generated_choices, 0)::bigint as generated_choices,
        (sum(chosen.prompt_choices) over (partition by experts.run_id, experts.layer))::double
        / layers.top_k as prompt_tokens,
        (sum(chosen.generated_choices) over (partition by experts.run_id, experts.layer))::double
        / layers.top_k as generated_tokens
    from experts
    join layers
        on layers.run_id = experts.run_id
        and layers.layer = experts.layer
    left join chosen
        on chosen.run_id = experts.run_id
        and chosen.layer = experts.layer
        and chosen.expert = experts.expert
),
shares as (
    select
        run_id,
        layer,
        expert,
        prompt_choices,
        generated_choices,
        prompt_choices::double / prompt_tokens as prompt_share,
        generated_choices::double / generated_tokens as generated_share,
        (prompt_choices + generated_choices)::double / (prompt_tokens + generated_tokens) as pooled_share,
        1 / prompt_tokens + 1 / generated_tokens as per_token
    from counted
    where prompt_tokens > 0
        and generated_tokens > 0
)
select
    run_id,
    layer,
    expert,
    prompt_choices as prompt_tokens,
    generated_choices as generated_tokens,
    prompt_share,
    generated_share,
    generated_share - prompt_share as difference,
    (generated_share - prompt_share)
    / nullif(sqrt(pooled_share * greatest(1 - pooled_share, 0) * per_token), 0) as z
from shares
order by run_id, layer, round(abs(generated_share - prompt_share), 12) desc, expert
