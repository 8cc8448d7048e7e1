-- complete_runs: every run has all its planned segments. A run that is still being ingested fails this check.
-- One row per incomplete run: run its ingest command again, or delete it with moewh runs --delete.
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
