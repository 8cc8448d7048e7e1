-- specialization_shuffled: whether a domain's best expert beats the best expert of a random group of prompts.
-- One row per run, layer and domain. Of the experts that get at least min_share of the domain's tokens, the one with the
-- largest lift (domain_specialization; ties: the lowest). The labels of whole prompts are shuffled deterministically
-- (shuffled_domains), and the best expert of the group that then has this label is found again:
--   shuffled, shuffled_most = mean and maximum of its lift over the shuffles, that is, by chance
--   p = (1 + shuffles with at least this lift) / (1 + shuffles)    at least 0.048 with 20 shuffles
-- A domain of only a few prompts reaches high lifts whatever its subject: p shows this, the lift does not.
-- Reads the rows, so the cost grows with tokens, and also with prompts times shuffles: give run and layer.
-- Parameters:
--   shuffles (count): at most 1000; default 20.
--   min_share (share): default 0.1.
--   run (run): default every run.
--   layer (layer): default every layer.
with overall as (
    select
        run_id,
        layer,
        expert,
        sum(share * choices) as tokens
    from shuffled_shares
    where shuffle = 0
    group by
        run_id,
        layer,
        expert
),
overall_shares as (
    select
        run_id,
        layer,
        expert,
        tokens / sum(tokens) over (partition by run_id, layer) as share
    from overall
),
lifts as (
    select
        shuffled_shares.run_id as run_id,
        shuffled_shares.layer as layer,
        shuffled_shares.shuffle as shuffle,
        shuffled_shares.domain as domain,
        shuffled_shares.expert as expert,
        shuffled_shares.share / nullif(overall_shares.share, 0) as lift
    from shuffled_shares
    join overall_shares
        on overall_shares.run_id = shuffled_shares.run_id
        and overall_shares.layer = shuffled_shares.layer
        and overall_shares.expert = shuffled_shares.expert
    join layers
        on layers.run_id = shuffled_shares.run_id
        and layers.layer = shuffled_shares.layer
    where shuffled_shares.share * layers.top_k >= coalesce(getvariable('min_share')::double, 0.1) - 0.000000000001
),
ranked as (
    select
        run_id,
        layer,
        shuffle,
        domain,
        expert,
        lift,
        row_number() over (
            partition by run_id, layer, shuffle, domain
            order by round(lift, 12) desc, expert asc
        ) as place
    from lifts
    where lift is not null
),
best as (
    select
        run_id,
        layer,
        shuffle,
        domain,
        expert,
        lift
    from ranked
    where place = 1
)
select
    here.run_id as run_id,
    here.layer as layer,
    here.domain as domain,
    max(here.expert) as expert,
    max(here.lift) as lift,
    avg(shuffles.lift) as shuffled,
    max(shuffles.lift) as shuffled_most,
    count(shuffles.shuffle)::bigint as shuffles,
    (1 + sum(case when shuffles.lift >= here.lift - 0.000000000001 then 1 else 0 end))::double
    / (1 + count(shuffles.shuffle)) as p
from best as here
left join best as shuffles
    on shuffles.run_id = here.run_id
    and shuffles.layer = here.layer
    and shuffles.domain is not distinct from here.domain
    and shuffles.shuffle > 0
where here.shuffle = 0
group by
    here.run_id,
    here.layer,
    here.domain
order by run_id, layer, domain
