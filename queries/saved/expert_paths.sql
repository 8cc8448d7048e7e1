-- expert_paths: the paths that most tokens take through the layers.
-- One row per run and path, the most used first. Paths are those of first_choice_paths; N tokens have one:
--   share            = N_path / N
--   cumulative_share = the share of this path and all before it
-- expert_path_coverage shows how many paths cover which share of the tokens.
-- A run whose ranks are not known has no first choices and no rows here.
-- Parameters:
--   run (run): default every run.
--   domain (domain): default all tokens.
--   most (count): maximum paths per run; default 20.
select
    run_id,
    path,
    tokens,
    tokens::double / tokens_all as share,
    tokens_so_far::double / tokens_all as cumulative_share
from ranked_paths
where place <= coalesce(getvariable('most'), 20)
order by run_id, place
