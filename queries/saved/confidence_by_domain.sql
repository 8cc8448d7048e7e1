-- confidence_by_domain: how sure the router is of each domain's tokens.
-- One row per run, domain and layer, over tokens of kind prompt and generated with raw logits (runs ingested with
-- --router-logits). Means of router_confidence: entropy (bits), top_k_mass, margin. NULL counts as a domain.
-- Parameters:
--   run (run): default every run.
--   layer (layer): default every layer.
select
    router_confidence.run_id as run_id,
    token_domains.domain as domain,
    router_confidence.layer as layer,
    count(*)::bigint as tokens,
    avg(router_confidence.entropy) as entropy,
    avg(router_confidence.top_k_mass) as top_k_mass,
    avg(router_confidence.margin) as margin
from router_confidence
join token_domains
    on token_domains.run_id = router_confidence.run_id
    and token_domains.segment = router_confidence.segment
    and token_domains.token_id = router_confidence.token_id
where token_domains.kind <> 'special'
    and (getvariable('run') is null or router_confidence.run_id = getvariable('run')::varchar)
    and (getvariable('layer') is null or router_confidence.layer = getvariable('layer'))
group by
    router_confidence.run_id,
    token_domains.domain,
    router_confidence.layer
order by run_id, domain, layer
