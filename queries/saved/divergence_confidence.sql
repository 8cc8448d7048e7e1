-- divergence_confidence: whether two domains differ more in their routing than two random groups of the same prompts.
-- One row per run, layer and ordered pair of different domains. divergence as in domain_divergence (Jensen-Shannon, bits).
-- The labels of whole prompts are shuffled deterministically (shuffled_domains), and the divergence of the groups that
-- then have these labels is computed again:
--   shuffled, shuffled_most = its mean and maximum over the shuffles, that is, by chance
--   p = (1 + shuffles with at least this divergence) / (1 + shuffles)    at least 0.048 with 20 shuffles
-- Reads the rows, so the cost grows with tokens, and also with prompts times shuffles: give run and layer.
-- Parameters:
--   shuffles (count): at most 1000; default 20.
--   run (run): default every run.
--   layer (layer): default every layer.
with paired as (
    select
        here.run_id as run_id,
        here.layer as layer,
        here.shuffle as shuffle,
        here.domain as domain,
        there.domain as other_domain,
        here.share as p,
        there.share as q,
        (here.share + there.share) / 2 as m
    from shuffled_shares as here
    join shuffled_shares as there
        on there.run_id = here.run_id
        and there.layer = here.layer
        and there.shuffle = here.shuffle
        and there.expert = here.expert
    where here.domain is distinct from there.domain
),
divergences as (
    select
        run_id,
        layer,
        shuffle,
        domain,
        other_domain,
        sum(coalesce(p * log2(nullif(p, 0) / m), 0) + coalesce(q * log2(nullif(q, 0) / m), 0)) / 2 as divergence
    from paired
    group by
        run_id,
        layer,
        shuffle,
        domain,
        other_domain
),
real_ones as (
    select
        run_id,
        layer,
        domain,
        other_domain,
        divergence
    from divergences
    where shuffle = 0
)
select
    real_ones.run_id as run_id,
    real_ones.layer as layer,
    real_ones.domain as domain,
    real_ones.other_domain as other_domain,
    max(real_ones.divergence) as divergence,
    avg(shuffles.divergence) as shuffled,
    max(shuffles.divergence) as shuffled_most,
    count(shuffles.shuffle)::bigint as shuffles,
    (1 + sum(case when shuffles.divergence >= real_ones.divergence - 0.000000000001 then 1 else 0 end))::double
    / (1 + count(shuffles.shuffle)) as p
from real_ones
left join divergences as shuffles
    on shuffles.run_id = real_ones.run_id
    and shuffles.layer = real_ones.layer
    and shuffles.domain is not distinct from real_ones.domain
    and shuffles.other_domain is not distinct from real_ones.other_domain
    and shuffles.shuffle > 0
group by
    real_ones.run_id,
    real_ones.layer,
    real_ones.domain,
    real_ones.other_domain
order by run_id, layer, domain, other_domain
