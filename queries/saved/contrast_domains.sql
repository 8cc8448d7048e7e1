-- contrast_domains: which experts one domain uses more than another, largest difference first.
-- One row per run, layer and expert. share and other_share are the shares of each domain's tokens that are routed to
-- the expert (domain_specialization: over the layer's experts each sums to top_k):
--   difference = share - other_share
--   ratio      = share / other_share, NULL if other_share is 0
-- Parameters:
--   domain (domain): one domain.
--   other_domain (domain): the other.
--   run (run): default every run.
--   layer (layer): default every layer.
select
    here.run_id as run_id,
    here.layer as layer,
    here.expert as expert,
    here.tokens as tokens,
    there.tokens as other_tokens,
    here.share as share,
    there.share as other_share,
    here.share - there.share as difference,
    here.share / nullif(there.share, 0) as ratio
from domain_specialization as here
join domain_specialization as there
    on there.run_id = here.run_id
    and there.layer = here.layer
    and there.expert = here.expert
where here.domain = getvariable('domain')::varchar
    and there.domain = getvariable('other_domain')::varchar
    and (getvariable('run') is null or here.run_id = getvariable('run')::varchar)
    and (getvariable('layer') is null or here.layer = getvariable('layer'))
order by run_id, round(abs(here.share - there.share), 12) desc, layer, expert
