-- expert_path_coverage: how many paths through the layers cover 50, 80 and 95 % of the tokens.
-- One row per run and coverage. Paths are those of first_choice_paths:
--   coverage    = 0.5, 0.8 or 0.95
--   paths       = the smallest number of paths that together have that share of the tokens
--   paths_used  = paths that any token takes; tokens = tokens with a path. Both grow with the corpus, so compare runs over
--                 the same corpus.
-- A run whose ranks are not known has no first choices and no rows here.
-- Parameters:
--   run (run): default every run.
--   domain (domain): default all tokens.
with coverages as (
    select 0.5::double as coverage
    union all
    select 0.8::double as coverage
    union all
    select 0.95::double as coverage
)
select
    ranked_paths.run_id as run_id,
    coverages.coverage as coverage,
    min(ranked_paths.place)::bigint as paths,
    max(ranked_paths.paths_used)::bigint as paths_used,
    max(ranked_paths.tokens_all)::bigint as tokens
from ranked_paths
join coverages
    on ranked_paths.tokens_so_far >= coverages.coverage * ranked_paths.tokens_all
group by
    ranked_paths.run_id,
    coverages.coverage
order by run_id, coverage
