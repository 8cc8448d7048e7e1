-- domain_sums: over all experts, domain_specialization.tokens sums to top_k times the domain's tokens (its first
-- choices), and share sums to top_k. If ranks are not known, only the shares are checked.
-- One row per run, domain and layer where a sum is different.
-- Parameters:
--   run (run): default every run.
with first_choices as (
    select
        run_id,
        domain,
        layer,
        sum(first_choice_tokens)::bigint as tokens
    from expert_counts
    where kind <> 'special'
    group by
        run_id,
        domain,
        layer
)
select
    domain_specialization.run_id as run_id,
    domain_specialization.domain as domain,
    domain_specialization.layer as layer,
    sum(domain_specialization.share) as share_sum,
    sum(domain_specialization.tokens)::bigint as tokens,
    max(layers.top_k) as top_k,
    max(first_choices.tokens) as first_choices
from domain_specialization
join layers
    on layers.run_id = domain_specialization.run_id
    and layers.layer = domain_specialization.layer
join first_choices
    on first_choices.run_id = domain_specialization.run_id
    and first_choices.domain is not distinct from domain_specialization.domain
    and first_choices.layer = domain_specialization.layer
where (getvariable('run') is null or domain_specialization.run_id = getvariable('run')::varchar)
group by
    domain_specialization.run_id,
    domain_specialization.domain,
    domain_specialization.layer
having not abs(sum(domain_specialization.share) - max(layers.top_k)) < 0.000001
    or sum(domain_specialization.tokens) <> max(layers.top_k) * max(first_choices.tokens)
order by run_id, domain, layer
