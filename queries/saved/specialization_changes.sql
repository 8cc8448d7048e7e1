-- specialization_changes: experts whose preference for a domain appeared or vanished between two checkpoints.
-- One row per domain, layer and expert that is specialized in the domain in only one of the runs. Specialized means a lift
-- of at least min_lift and a share of at least min_share (domain_specialization).
--   change = appeared (specialized in run, not in other_run) or vanished (the reverse)
-- Give the later checkpoint as run. Largest change of lift first. The runs must have the same tokens (equal tokens_key),
-- because with other prompts the domains themselves differ, and as many experts at the same layers. Both must be
-- complete. A domain of only one of them (imports that label the same tokens differently) is left out.
-- Parameters:
--   run (run): the later checkpoint.
--   other_run (complete run of the same tokens): the earlier checkpoint.
--   min_lift (ratio): default 1.5.
--   min_share (share): default 0.1.
with same_tokens as (
    select
        here.run_id as run_id,
        there.run_id as other_run_id
    from runs as here
    join runs as there
        on there.tokens_key = here.tokens_key
    join experts_keys as here_experts
        on here_experts.run_id = here.run_id
    join experts_keys as there_experts
        on there_experts.run_id = there.run_id
        and there_experts.experts_key = here_experts.experts_key
    where here.run_id = getvariable('run')::varchar
        and there.run_id = getvariable('other_run')::varchar
        and here.status = 'complete'
        and there.status = 'complete'
),
compared as (
    select
        here.domain as domain,
        here.layer as layer,
        here.expert as expert,
        there.share as other_share,
        here.share as share,
        coalesce(there.lift, 0) as other_lift,
        coalesce(here.lift, 0) as lift,
        case
            when here.lift >= coalesce(getvariable('min_lift')::double, 1.5)
                and here.share >= coalesce(getvariable('min_share')::double, 0.1) then 1
            else 0
        end as special,
        case
            when there.lift >= coalesce(getvariable('min_lift')::double, 1.5)
                and there.share >= coalesce(getvariable('min_share')::double, 0.1) then 1
            else 0
        end as other_special
    from same_tokens
    join domain_specialization as here
        on here.run_id = same_tokens.run_id
    join domain_specialization as there
        on there.run_id = same_tokens.other_run_id
        and there.domain is not distinct from here.domain
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
order by round(abs(lift - other_lift), 12) desc, domain, layer, expert
