-- expert_path_coverage: how many paths through the layers cover 50, 80 and 95 % of the tokens.
-- One row per run and coverage. Paths are those of first_choice_paths:
--   coverage    = 0.5, 0.8 or 0.95
--   paths       = the least number of paths that together have that share of the tokens
--   paths_used  = paths that any token takes; tokens = those that have one. Both grow with the corpus: compare equal ones.
-- Parameters:
--   run (run): default every run.
--   domain (domain): default all tokens.
with path_tokens as (
    select
        run_id,
        path,
        sum(tokens)::bigint as tokens
    from first_choice_paths
    where (getvariable('run') is null or run_id = getvariable('run')::varchar)
        and (getvariable('domain') is null or domain = getvariable('domain')::varchar)
    group by
        run_id,
        path
),
covered as (
    select
        run_id,
        row_number() over (partition by run_id order by tokens desc, path) as place,
        count(*) over (partition by run_id) as paths_used,
        sum(tokens) over (partition by run_id) as tokens_all,
        sum(tokens) over (
            partition by run_id
            order by tokens desc, path
            rows between unbounded preceding and current row
        ) as tokens_so_far
    from path_tokens
),
coverages as (
    select 0.5::double as coverage
    union all
    select 0.8::double as coverage
    union all
    select 0.95::double as coverage
)
select
    covered.run_id as run_id,
    coverages.coverage as coverage,
    min(covered.place)::bigint as paths,
    max(covered.paths_used)::bigint as paths_used,
    max(covered.tokens_all)::bigint as tokens
from covered
join coverages
    on covered.tokens_so_far >= coverages.coverage * covered.tokens_all
group by
    covered.run_id,
    coverages.coverage
order by run_id, coverage
