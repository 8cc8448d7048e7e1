-- domain_experts: which experts each domain prefers, strongest preference first.
-- One row per run, domain, layer and expert that is chosen for at least min_share of the domain's tokens.
-- share, overall_share and lift as in domain_specialization.
-- Parameters:
--   run (run): default every run.
--   min_share (share): default 0.1.
select
    run_id,
    domain,
    layer,
    expert,
    tokens,
    share,
    overall_share,
    lift
from domain_specialization
where share >= coalesce(getvariable('min_share')::double, 0.1)
    and (getvariable('run') is null or run_id = getvariable('run')::varchar)
order by run_id, domain, lift desc, layer, expert
