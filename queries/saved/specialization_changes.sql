-- specialization_changes: experts whose preference for a domain appeared or vanished between two checkpoints.
-- One row per domain, layer and expert that is special to the domain in one run and not in the other; special: lift of
-- at least min_lift at a share of at least min_share (domain_specialization).
--   change = appeared (special in run, not in other_run) or vanished (the other way round)
-- Give the later checkpoint as run. Largest change of lift first.
-- Parameters: run, other_run; min_lift (default 1.5), min_share (default 0.1).
with compared as (
    select
        here.domain as domain,
        here.layer as layer,
        here.expert as expert,
        there.share as other_share,
        here.share as share,
        coalesce(there.lift, 0) as other_lift,
        coalesce(here.lift, 0) as lift,
        case
            when here.lift >= coalesce(getvariable('min_lift'), 1.5)
                and here.share >= coalesce(getvariable('min_share'), 0.1) then 1
            else 0
        end as special,
        case
            when there.lift >= coalesce(getvariable('min_lift'), 1.5)
                and there.share >= coalesce(getvariable('min_share'), 0.1) then 1
            else 0
        end as other_special
    from domain_specialization as here
    join domain_specialization as there
        on there.domain is not distinct from here.domain
        and there.layer = here.layer
        and there.expert = here.expert
    where here.run_id = getvariable('run')::varchar
        and there.run_id = getvariable('other_run')::varchar
)
select
    case when special = 1 then 'appeared' else 'vanished' end as change,
    domain,
    layer,
    expert,
    other_share,
    share,
    other_lift,
    lift
from compared
where special <> other_special
order by abs(lift - other_lift) desc, domain, layer, expert
