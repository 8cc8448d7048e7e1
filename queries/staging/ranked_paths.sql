-- ranked_paths: the paths of first_choice_paths, over the tokens of one domain or of all, ranked by use.
-- One row per run and path that some token takes.
-- Parameters:
--   run (run): default every run.
--   domain (domain): default all tokens.
create or replace view ranked_paths as
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
)
select
    run_id,
    path,
    tokens,
    row_number() over (partition by run_id order by tokens desc, path asc) as place,
    count(*) over (partition by run_id) as paths_used,
    sum(tokens) over (partition by run_id) as tokens_all,
    sum(tokens) over (
        partition by run_id
        order by tokens desc, path asc
        rows between unbounded preceding and current row
    ) as tokens_so_far
from path_tokens;

comment on view ranked_paths is 'Staging. One row per path through the layers, ranked by the tokens that take it.';
comment on column ranked_paths.run_id is 'The run these rows belong to.';
comment on column ranked_paths.path is 'First choice (rank 0) at every MoE layer, in order of layer, joined by -.';
comment on column ranked_paths.tokens is 'Tokens that take this path.';
comment on column ranked_paths.place is '1-based rank of the path in its run, by descending tokens; ties by path.';
comment on column ranked_paths.paths_used is 'Paths that any token takes.';
comment on column ranked_paths.tokens_all is 'Tokens that have a path.';
comment on column ranked_paths.tokens_so_far is 'Tokens of this path and of all before it.';
