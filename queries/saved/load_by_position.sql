-- load_by_position: which experts the tokens at the start, the middle and the end of a prompt use.
-- One row per run, layer, range of positions and expert. A range has width positions; first_position is its first.
-- Over tokens of kind prompt and generated:
--   tokens        = N_ir: tokens of the range routed to the expert
--   share         = N_ir / N_r of the range's tokens with rows at the layer; over experts it sums to top_k
--   overall_share = N_i / N of all positions, lift = share / overall_share: 1 if independent of the position
--   routed_share  = share of the range's tokens that have rows at the layer: below 1 if tokens are dropped, as capacity
--                   limits do towards the end of a prompt (OpenMoE, arXiv:2402.01739). The last token of a generation
--                   has no rows at any layer
-- In an encoder-decoder model, the tokens of a decoder's layers are the generated ones, and their positions follow the
-- encoder's; the tokens of an encoder's layers are all others.
-- Reads the rows, so the cost grows with tokens: give run and layer.
-- Parameters:
--   width (count): positions per range, at least 1; default 64.
--   run (run): default every run.
--   layer (layer): default every layer.
with chosen as (
    select
        run_id,
        layer,
        token_id % 16777216 - token_id % 16777216 % greatest(coalesce(getvariable('width'), 64), 1) as first_position,
        expert,
        count(*)::bigint as tokens
    from routing
    where kind <> 'special'
        and (getvariable('run') is null or run_id = getvariable('run')::varchar)
        and (getvariable('layer') is null or layer = getvariable('layer'))
    group by
        run_id,
        layer,
        token_id % 16777216 - token_id % 16777216 % greatest(coalesce(getvariable('width'), 64), 1),
        expert
),
encoders as (
    select distinct run_id
    from layers
    where stack = 'encoder'
),
all_tokens as (
    select
        tokens.run_id as run_id,
        case when encoders.run_id is null or tokens.kind = 'generated' then 'decoder' else 'encoder' end as stack,
        tokens.token_id % 16777216
        - tokens.token_id % 16777216 % greatest(coalesce(getvariable('width'), 64), 1) as first_position,
        count(*)::double as tokens
    from tokens
    left join encoders
        on encoders.run_id = tokens.run_id
    where tokens.kind <> 'special'
        and (getvariable('run') is null or tokens.run_id = getvariable('run')::varchar)
    group by
        tokens.run_id,
        case when encoders.run_id is null or tokens.kind = 'generated' then 'decoder' else 'encoder' end,
        tokens.token_id % 16777216
        - tokens.token_id % 16777216 % greatest(coalesce(getvariable('width'), 64), 1)
),
ranges as (
    select
        run_id,
        layer,
        first_position,
        sum(tokens)::double as choices
    from chosen
    group by
        run_id,
        layer,
        first_position
),
counted as (
    select
        ranges.run_id as run_id,
        ranges.layer as layer,
        ranges.first_position as first_position,
        coalesce(layers.stack, 'decoder') as stack,
        experts.expert as expert,
        coalesce(chosen.tokens, 0)::bigint as tokens,
        ranges.choices / layers.top_k as range_tokens,
        coalesce(sum(chosen.tokens) over (
            partition by ranges.run_id, ranges.layer, experts.expert
        ), 0)::double as expert_tokens,
        (sum(chosen.tokens) over (partition by ranges.run_id, ranges.layer))::double
        / layers.top_k as layer_tokens
    from ranges
    join layers
        on layers.run_id = ranges.run_id
        and layers.layer = ranges.layer
    join experts
        on experts.run_id = ranges.run_id
        and experts.layer = ranges.layer
    left join chosen
        on chosen.run_id = ranges.run_id
        and chosen.layer = ranges.layer
        and chosen.first_position = ranges.first_position
        and chosen.expert = experts.expert
)
select
    counted.run_id as run_id,
    counted.layer as layer,
    counted.first_position::integer as first_position,
    counted.expert as expert,
    counted.tokens as tokens,
    counted.tokens / counted.range_tokens as share,
    counted.expert_tokens / counted.layer_tokens as overall_share,
    counted.tokens * counted.layer_tokens / nullif(counted.range_tokens * counted.expert_tokens, 0) as lift,
    counted.range_tokens / all_tokens.tokens as routed_share
from counted
join all_tokens
    on all_tokens.run_id = counted.run_id
    and all_tokens.stack = counted.stack
    and all_tokens.first_position = counted.first_position
order by counted.run_id, counted.layer, counted.first_position, counted.expert
