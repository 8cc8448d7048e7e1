-- complete_runs: every run has all the segments it was planned to have. While an ingest goes on, its run has not.
-- One row per run that has not: run its ingest command again, or delete it with moewh runs --delete.
-- Parameters:
--   run (run): default every run.
select
    run_id,
    status,
    segments,
    segments_planned
from runs
where status <> 'complete'
    and (getvariable('run') is null or run_id = getvariable('run')::varchar)
order by run_id
