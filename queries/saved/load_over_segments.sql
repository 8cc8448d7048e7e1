-- load_over_segments: how much the load of each expert varies from segment to segment of a run.
-- One row per run, layer and expert. A segment is the unit that moewh commits (--segment-rows). In each segment with
-- tokens at the layer, share is the expert's share of the segment's choices, 0 if it has none, over tokens of kind
-- prompt and generated:
--   least, p5, p50, p95, most = percentiles of share over the segments, interpolated between two of them
--   share                     = over the whole run (expert_load)
-- With n choices per segment, k per token, chance alone moves a share p by about sqrt(p (1 - k p) / n).
-- Reads the rows, so the cost grows with tokens: give run and layer.
-- Parameters:
--   run (run): default every run.
--   layer (layer): default every layer.
with chosen as (
    select
        run_id,
        segment,
        layer,
        expert,
        count(*)::double as tokens
    from routing
    where kind <> 'special'
        and (getvariable('run') is null or run_id = getvariable('run')::varchar)
        and (getvariable('layer') is null or layer = getvariable('layer'))
    group by
        run_id,
        segment,
        layer,
        expert
),
totals as (
    select
        run_id,
        segment,
        layer,
        sum(tokens) as tokens
    from chosen
    group by
        run_id,
        segment,
        layer
),
shares as (
    select
        totals.run_id as run_id,
        totals.layer as layer,
        experts.expert as expert,
        coalesce(chosen.tokens, 0) as tokens,
        totals.tokens as choices,
        coalesce(chosen.tokens, 0) / totals.tokens as share
    from totals
    join experts
        on experts.run_id = totals.run_id
        and experts.layer = totals.layer
    left join chosen
        on chosen.run_id = totals.run_id
        and chosen.segment = totals.segment
        and chosen.layer = totals.layer
        and chosen.expert = experts.expert
),
ranked as (
    -- place: 0-based position of a share among its expert's n shares; percentile q is at q (n - 1), between two of them
    select
        run_id,
        layer,
        expert,
        tokens,
        choices,
        share,
        row_number() over (partition by run_id, layer, expert order by share asc) - 1 as place,
        count(*) over (partition by run_id, layer, expert) - 1 as last_place
    from shares
)
select
    run_id,
    layer,
    expert,
    count(*)::bigint as segments,
    sum(tokens) / sum(choices) as share,
    min(share) as least,
    sum(share * greatest(1 - abs(place - 0.05::double * last_place), 0)) as p5,
    sum(share * greatest(1 - abs(place - 0.5::double * last_place), 0)) as p50,
    sum(share * greatest(1 - abs(place - 0.95::double * last_place), 0)) as p95,
    max(share) as most
from ranked
group by
    run_id,
    layer,
    expert
order by run_id, layer, expert
