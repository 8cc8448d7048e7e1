-- repetition_counts: how often adjacent tokens choose the same experts.
-- One row per run, segment, domain and layer with at least one pair of adjacent tokens: positions p and p + 1 of one
-- prompt and context (their token_id differ by 1), both of kind prompt or generated, both with rows at the layer.
-- Mergeable: counts of several segments add up, because no prompt is split across segments. first_choice_pairs is NULL
-- if no rank is known.
with adjacent as (
    select
        here.run_id as run_id,
        here.segment as segment,
        here.domain as domain,
        here.token_id as token_id
    from token_domains as here
    join tokens as there
        on there.run_id = here.run_id
        and there.segment = here.segment
        and there.token_id = here.token_id + 1
        and there.prompt_id = here.prompt_id
        and there.context = here.context
    where here.kind in ('prompt', 'generated')
        and there.kind in ('prompt', 'generated')
),
compared as (
    select
        adjacent.run_id as run_id,
        adjacent.segment as segment,
        adjacent.domain as domain,
        adjacent.token_id as token_id,
        a.layer as layer,
        sum(case when a.expert = b.expert then 1 else 0 end) as shared,
        sum(case
            when a.expert = b.expert and a.rank = 0 and b.rank = 0 then 1
            when a.rank >= 0 and b.rank >= 0 then 0
        end) as shared_first
    from adjacent
    join routing as a
        on a.run_id = adjacent.run_id
        and a.segment = adjacent.segment
        and a.token_id = adjacent.token_id
    join routing as b
        on b.run_id = adjacent.run_id
        and b.segment = adjacent.segment
        and b.token_id = a.token_id + 1
        and b.layer = a.layer
    group by
        adjacent.run_id,
        adjacent.segment,
        adjacent.domain,
        adjacent.token_id,
        a.layer
)
select
    run_id,
    segment,
    domain,
    layer,
    count(*)::bigint as pairs,
    sum(shared_first)::bigint as first_choice_pairs,
    sum(case when shared > 0 then 1 else 0 end)::bigint as any_choice_pairs
from compared
group by
    run_id,
    segment,
    domain,
    layer
