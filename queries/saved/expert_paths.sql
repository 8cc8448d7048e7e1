-- expert_paths: the paths that most tokens take through the layers.
-- One row per run and path, the most used first. Paths are those of first_choice_paths, N all tokens that have one:
--   share            = N_path / N
--   cumulative_share = the share of this path and all before it
-- expert_path_coverage tells how many paths cover how much.
-- Parameters:
--   run (run): default every run.
--   domain (domain): default all tokens.
--   most (count): paths per run at most; default 20.
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
        path,
        tokens,
        row_number() over (partition by run_id order by tokens desc, path) as place,
        sum(tokens) over (partition by run_id) as tokens_all,
        sum(tokens) over (
            partition by run_id
            order by tokens desc, path
            rows between unbounded preceding and current row
        ) as tokens_so_far
    from path_tokens
)
select
    run_id,
    path,
    tokens,
    tokens::double / tokens_all as share,
    tokens_so_far::double / tokens_all as cumulative_share
from covered
where place <= coalesce(getvariable('most'), 20)
order by run_id, place
