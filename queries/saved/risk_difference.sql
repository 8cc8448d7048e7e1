-- risk_difference: which experts one group of tokens activates more often than another.
-- One row per run, layer and expert that a token of either group chooses, largest difference first, if both groups have
-- tokens. A group is the tokens of kind prompt and generated that meet every condition given for it: its domain, prompts
-- or token ids (a span of tokens).
-- Without a condition for the other group, it is all tokens that are not in the first.
--   rate = tokens / N of the group, with N its tokens with rows at the layer; over experts it sums to top_k
--   risk_difference = rate - other_rate                 SteerMoE (arXiv:2509.09660)
--   z = risk_difference / its standard error if both groups are routed identically. Tokens of one prompt are correlated,
--       which makes z too large: specialization_confidence counts prompts instead. NULL if a token is in both groups.
-- Reads the rows, so the cost grows with tokens: give run and layer.
-- Parameters (the first six are conditions, each optional):
--   domain (domain): the first group's domain.
--   prompt_ids (prompt ids): its prompts, such as 3,17,256; in a shell as text: '3,17,256'.
--   token_ids (token ids): its tokens; a token's id is prompt_id * 2^24 + position.
--   other_domain (domain): the other group's domain.
--   other_prompt_ids (prompt ids): its prompts.
--   other_token_ids (token ids): its tokens.
--   run (run): default every run.
--   layer (layer): default every layer.
with listed_parts as (
    select unnest(string_split(getvariable('token_ids')::varchar, ',')) as part
),
listed_ids as (
    select distinct part::bigint as token_id
    from listed_parts
),
listed_prompt_parts as (
    select unnest(string_split(getvariable('prompt_ids')::varchar, ',')) as part
),
listed_prompts as (
    select distinct part::bigint as prompt_id
    from listed_prompt_parts
),
other_parts as (
    select unnest(string_split(getvariable('other_token_ids')::varchar, ',')) as part
),
other_ids as (
    select distinct part::bigint as token_id
    from other_parts
),
other_prompt_parts as (
    select unnest(string_split(getvariable('other_prompt_ids')::varchar, ',')) as part
),
other_prompts as (
    select distinct part::bigint as prompt_id
    from other_prompt_parts
),
grouped as (
    select
        routing.run_id as run_id,
        routing.layer as layer,
        routing.expert as expert,
        case
            when (getvariable('domain') is null or coalesce(routing.domain = getvariable('domain')::varchar, false))
                and (getvariable('prompt_ids') is null or listed_prompts.prompt_id is not null)
                and (getvariable('token_ids') is null or listed_ids.token_id is not null) then 1
            else 0
        end as here,
        case
            when getvariable('other_domain') is null
                and getvariable('other_prompt_ids') is null
                and getvariable('other_token_ids') is null then null
            when (getvariable('other_domain') is null
                or coalesce(routing.domain = getvariable('other_domain')::varchar, false))
                and (getvariable('other_prompt_ids') is null or other_prompts.prompt_id is not null)
                and (getvariable('other_token_ids') is null or other_ids.token_id is not null) then 1
            else 0
        end as there
    from routing
    left join listed_ids
        on listed_ids.token_id = routing.token_id
    left join listed_prompts
        on listed_prompts.prompt_id = routing.prompt_id
    left join other_ids
        on other_ids.token_id = routing.token_id
    left join other_prompts
        on other_prompts.prompt_id = routing.prompt_id
    where routing.kind <> 'special'
        and (getvariable('run') is null or routing.run_id = getvariable('run')::varchar)
        and (getvariable('layer') is null or routing.layer = getvariable('layer'))
),
chosen as (
    select
        run_id,
        layer,
        expert,
        sum(here)::bigint as tokens,
        sum(coalesce(there, 1 - here))::bigint as other_tokens,
        sum(here * coalesce(there, 1 - here))::bigint as common
    from grouped
    group by
        run_id,
        layer,
        expert
),
counted as (
    select
        chosen.run_id as run_id,
        chosen.layer as layer,
        chosen.expert as expert,
        chosen.tokens as tokens,
        chosen.other_tokens as other_tokens,
        (sum(chosen.tokens) over (partition by chosen.run_id, chosen.layer))::double / layers.top_k as n,
        (sum(chosen.other_tokens) over (partition by chosen.run_id, chosen.layer))::double / layers.top_k as other_n,
        sum(chosen.common) over (partition by chosen.run_id, chosen.layer) as common
    from chosen
    join layers
        on layers.run_id = chosen.run_id
        and layers.layer = chosen.layer
),
rates as (
    select
        run_id,
        layer,
        expert,
        tokens,
        other_tokens,
        tokens / n as rate,
        other_tokens / other_n as other_rate,
        (tokens + other_tokens) / (n + other_n) as pooled_rate,
        1 / n + 1 / other_n as per_token,
        common
    from counted
    where n > 0
        and other_n > 0
        and tokens + other_tokens > 0
)
select
    run_id,
    layer,
    expert,
    tokens,
    other_tokens,
    rate,
    other_rate,
    rate - other_rate as risk_difference,
    case
        when common = 0 then
            (rate - other_rate) / nullif(sqrt(pooled_rate * greatest(1 - pooled_rate, 0) * per_token), 0)
    end as z
from rates
order by run_id, round(abs(rate - other_rate), 12) desc, layer, expert
