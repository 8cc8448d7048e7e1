-- domain_sums: over all experts, domain_specialization.share sums to top_k.
-- One row per run, domain and layer where it does not.
-- Parameters:
--   run (run): default every run.
select
    domain_specialization.run_id as run_id,
    domain_specialization.domain as domain,
    domain_specialization.layer as layer,
    sum(domain_specialization.share) as share_sum,
    max(layers.top_k) as expected
from domain_specialization
join layers
    on layers.run_id = domain_specialization.run_id
    and layers.layer = domain_specialization.layer
where (getvariable('run') is null or domain_specialization.run_id = getvariable('run')::varchar)
group by
    domain_specialization.run_id,
    domain_specialization.domain,
    domain_specialization.layer
having not abs(sum(domain_specialization.share) - max(layers.top_k)) < 0.000001
order by run_id, domain, layer
