-- expert_cache: how many of a layer's choices a cache of C experts would serve.
-- One row per run, layer and capacity C from 1 to E. The cache keeps the C most recently used experts of the layer (exact
-- LRU). It starts empty and sees the tokens of kind prompt and generated one at a time in order of token_id: prompt by
-- prompt, position by position, never emptied between prompts. All k experts of a token are looked up before any is
-- added; among one token's experts, the lower index counts as more recent. The first use of an expert is a miss.
--   hit_share    = choices whose expert is in the cache / choices
--   pinned_share = the same for a cache that always holds the C most used experts of these tokens
--   random       = C / E    both shares if each token's experts are drawn independently with equal probability
-- MoE-Infinity (arXiv:2401.14361) and other offloading systems report such hit rates.
-- Tracks every expert through every token, so the cost grows with tokens times E: give run, layer and, beyond about
-- 100,000 tokens, prompt_ids.
-- Parameters:
--   capacity (count): only this C; default all.
--   run (run): default every run.
--   layer (layer): default every layer.
--   prompt_ids (prompt ids): such as 3,17,256; in a shell as text: '3,17,256'; default every prompt.
with listed_parts as (
    select unnest(string_split(getvariable('prompt_ids')::varchar, ',')) as part
),
listed_prompts as (
    select part::bigint as prompt_id
    from listed_parts
),
chosen as (
    select
        run_id,
        layer,
        token_id,
        expert
    from routing
    where kind <> 'special'
        and (getvariable('run') is null or run_id = getvariable('run')::varchar)
        and (getvariable('layer') is null or layer = getvariable('layer'))
        and (
            getvariable('prompt_ids') is null
            or prompt_id in (select listed_prompts.prompt_id from listed_prompts)
        )
),
stream as (
    select
        run_id,
        layer,
        token_id,
        row_number() over (partition by run_id, layer order by token_id asc) as moment
    from chosen
    group by
        run_id,
        layer,
        token_id
),
looked_up as (
    -- every expert at every moment: later uses have larger numbers
    select
        stream.run_id as run_id,
        stream.layer as layer,
        stream.moment as moment,
        experts.expert as expert,
        case when chosen.expert is null then 0 else 1 end as used,
        case when chosen.expert is not null then stream.moment * layers.num_experts - experts.expert end as use_number
    from stream
    join layers
        on layers.run_id = stream.run_id
        and layers.layer = stream.layer
    join experts
        on experts.run_id = stream.run_id
        and experts.layer = stream.layer
    left join chosen
        on chosen.run_id = stream.run_id
        and chosen.layer = stream.layer
        and chosen.token_id = stream.token_id
        and chosen.expert = experts.expert
),
last_uses as (
    select
        run_id,
        layer,
        moment,
        expert,
        used,
        max(use_number) over (
            partition by run_id, layer, expert
            order by moment asc
            rows between unbounded preceding and 1 preceding
        ) as last_use
    from looked_up
),
placed as (
    -- the most recently used expert has place 1: a cache of C holds places 1 to C
    select
        run_id,
        layer,
        used,
        last_use,
        row_number() over (partition by run_id, layer, moment order by coalesce(last_use, 0) desc, expert asc) as place
    from last_uses
),
hits_at as (
    select
        run_id,
        layer,
        place,
        count(*)::bigint as hits
    from placed
    where used = 1
        and last_use is not null
    group by
        run_id,
        layer,
        place
),
expert_uses as (
    select
        run_id,
        layer,
        expert,
        sum(used)::bigint as uses
    from looked_up
    group by
        run_id,
        layer,
        expert
),
capacities as (
    select
        run_id,
        layer,
        row_number() over (partition by run_id, layer order by uses desc, expert asc) as capacity,
        (sum(uses) over (
            partition by run_id, layer
            order by uses desc, expert asc
            rows between unbounded preceding and current row
        ))::bigint as pinned_hits,
        (sum(uses) over (partition by run_id, layer))::bigint as choices,
        count(*) over (partition by run_id, layer) as num_experts
    from expert_uses
),
curves as (
    select
        capacities.run_id as run_id,
        capacities.layer as layer,
        capacities.capacity as capacity,
        capacities.choices as choices,
        coalesce(sum(hits_at.hits) over (
            partition by capacities.run_id, capacities.layer
            order by capacities.capacity asc
            rows between unbounded preceding and current row
        ), 0)::bigint as hits,
        capacities.pinned_hits as pinned_hits,
        capacities.num_experts as num_experts
    from capacities
    left join hits_at
        on hits_at.run_id = capacities.run_id
        and hits_at.layer = capacities.layer
        and hits_at.place = capacities.capacity
)
select
    run_id,
    layer,
    capacity::bigint as capacity,
    choices,
    hits,
    hits::double / choices as hit_share,
    pinned_hits::double / choices as pinned_share,
    capacity::double / num_experts as random
from curves
where (getvariable('capacity') is null or capacity = getvariable('capacity'))
order by run_id, layer, capacity
