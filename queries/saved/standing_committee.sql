-- standing_committee: which experts rank high by weight in every domain.
-- One row per run, layer and expert that is present in at least min_share of the domains. In each domain the layer's
-- experts are ranked 1, 2, ... by the sum of their weights over its tokens of kind prompt and generated (ties: the
-- lowest); an expert is present in a domain if it is among the first k (experts per token), otherwise it has rank k + 1:
--   mean_rank, rank_variance = mean and population variance of its rank over the domains
--   committee    = 1 if no other listed expert has both at most as large and one of them smaller (Pareto), else 0
--   weight_share = mean over the domains of its share of the weights; NULL if an expert's weights sum to less than 0
-- CommitteeAudit (arXiv:2601.03425). NULL counts as a domain. With D domains and random weights an expert is present
-- in each with probability k / E. A run without weights has no rows.
-- Counts come from a rollup, so the cost does not grow with tokens.
-- Parameters:
--   run (run): default every run.
--   layer (layer): default every layer.
--   min_share (share): default 0.8.
with chosen as (
    select
        run_id,
        domain,
        layer,
        expert,
        sum(weight_sum) as weight_sum
    from expert_counts
    where kind <> 'special'
        and weight_sum is not null
        and (getvariable('run') is null or run_id = getvariable('run')::varchar)
        and (getvariable('layer') is null or layer = getvariable('layer'))
    group by
        run_id,
        domain,
        layer,
        expert
),
ranked as (
    select
        run_id,
        domain,
        layer,
        expert,
        case
            when min(weight_sum) over (partition by run_id, layer) >= 0 then
                weight_sum / nullif(sum(weight_sum) over (partition by run_id, domain, layer), 0)
        end as weight_share,
        row_number() over (partition by run_id, domain, layer order by weight_sum desc, expert asc) as place
    from chosen
),
domain_counts as (
    select
        run_id,
        layer,
        count(*) as domains
    from ranked
    where place = 1
    group by
        run_id,
        layer
),
summed as (
    -- a rank is k + 1 in every domain, minus k + 1 - place where the expert is present
    select
        ranked.run_id as run_id,
        ranked.layer as layer,
        ranked.expert as expert,
        domain_counts.domains as domains,
        layers.top_k + 1 as absent_rank,
        sum(case when ranked.place <= layers.top_k then 1 else 0 end)::bigint as domains_present,
        sum(case when ranked.place <= layers.top_k then ranked.place else 0 end)::bigint as places,
        sum(case when ranked.place <= layers.top_k then ranked.place * ranked.place else 0 end)::bigint as squares,
        sum(ranked.weight_share) / domain_counts.domains as weight_share
    from ranked
    join domain_counts
        on domain_counts.run_id = ranked.run_id
        and domain_counts.layer = ranked.layer
    join layers
        on layers.run_id = ranked.run_id
        and layers.layer = ranked.layer
    group by
        ranked.run_id,
        ranked.layer,
        ranked.expert,
        domain_counts.domains,
        layers.top_k
),
present as (
    select
        run_id,
        layer,
        expert,
        domains,
        domains_present,
        weight_share,
        (places + absent_rank * (domains - domains_present))::bigint as rank_sum,
        (squares + absent_rank * absent_rank * (domains - domains_present))::bigint as square_sum
    from summed
    where domains_present::double >= coalesce(getvariable('min_share')::double, 0.8) * domains - 0.000000001
        and domains_present > 0
),
scored as (
    select
        run_id,
        layer,
        expert,
        domains,
        domains_present,
        weight_share,
        rank_sum,
        domains * square_sum - rank_sum * rank_sum as spread
    from present
),
dominated as (
    select distinct
        here.run_id as run_id,
        here.layer as layer,
        here.expert as expert
    from scored as here
    join scored as there
        on there.run_id = here.run_id
        and there.layer = here.layer
        and there.rank_sum <= here.rank_sum
        and there.spread <= here.spread
        and (there.rank_sum < here.rank_sum or there.spread < here.spread)
)
select
    scored.run_id as run_id,
    scored.layer as layer,
    scored.expert as expert,
    scored.domains as domains,
    scored.domains_present as domains_present,
    scored.rank_sum::double / scored.domains as mean_rank,
    scored.spread::double / (scored.domains * scored.domains) as rank_variance,
    scored.weight_share as weight_share,
    case when dominated.expert is null then 1 else 0 end as committee
from scored
left join dominated
    on dominated.run_id = scored.run_id
    and dominated.layer = scored.layer
    and dominated.expert = scored.expert
order by run_id, layer, mean_rank, rank_variance, expert
