-- expert_paths: the paths that most tokens take through the layers.
-- One row per run and path, the most used first. A path is a token's first choice (rank 0) at every MoE layer, as
-- '3-0-12-…' in order of layer. Over tokens of kind prompt and generated with rows at all MoE layers, N of them:
--   share            = N_path / N
--   cumulative_share = the share of this path and all before it
-- With L layers of E experts there are E^L paths: an even, independent router would hardly use one twice.
-- Reads the rows of rank 0. expert_path_coverage tells how many paths cover how much.
-- Parameters: run (default: every run), domain (default: all), most (paths a run, default 20).
with paths as (
    select
        routing.run_id as run_id,
        routing.token_id as token_id,
        string_agg(routing.expert::varchar, '-' order by routing.layer) as path,
        count(*) as layers
    from routing
    join tokens
        on tokens.run_id = routing.run_id
        and tokens.segment = routing.segment
        and tokens.token_id = routing.token_id
    join prompts
        on prompts.run_id = tokens.run_id
        and prompts.segment = tokens.segment
        and prompts.prompt_id = tokens.prompt_id
    where routing.rank = 0
        and tokens.kind <> 'special'
        and (getvariable('run') is null or routing.run_id = getvariable('run')::varchar)
        and (getvariable('domain') is null or prompts.domain = getvariable('domain')::varchar)
    group by
        routing.run_id,
        routing.token_id
),
depths as (
    select
        run_id,
        count(*) as layers
    from layers
    group by run_id
),
path_tokens as (
    select
        paths.run_id as run_id,
        paths.path as path,
        count(*)::bigint as tokens
    from paths
    join depths
        on depths.run_id = paths.run_id
        and depths.layers = paths.layers
    group by
        paths.run_id,
        paths.path
),
ranked as (
    select
        run_id,
        path,
        tokens,
        sum(tokens) over (partition by run_id) as tokens_all,
        row_number() over (partition by run_id order by tokens desc, path) as place
    from path_tokens
),
covered as (
    select
        run_id,
        place,
        path,
        tokens,
        tokens_all,
        sum(tokens) over (partition by run_id order by place rows between unbounded preceding and current row) as tokens_so_far
    from ranked
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
