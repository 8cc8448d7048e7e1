-- expert_path_coverage: how many paths through the layers cover 50, 80 and 95 % of the tokens.
-- One row per run and coverage. A path is a token's first choice (rank 0) at every MoE layer (see expert_paths); over
-- tokens of kind prompt and generated with rows at all MoE layers:
--   coverage    = 0.5, 0.8 or 0.95
--   paths       = the least number of paths that together have that share of the tokens
--   paths_used  = paths that any token takes; tokens = N. Both grow with the corpus: compare equal ones.
-- Reads the rows of rank 0.
-- Parameters: run (default: every run), domain (default: all).
with chosen_paths as (
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
        chosen_paths.run_id as run_id,
        chosen_paths.path as path,
        count(*)::bigint as tokens
    from chosen_paths
    join depths
        on depths.run_id = chosen_paths.run_id
        and depths.layers = chosen_paths.layers
    group by
        chosen_paths.run_id,
        chosen_paths.path
),
ranked as (
    select
        run_id,
        path,
        tokens,
        sum(tokens) over (partition by run_id) as tokens_all,
        count(*) over (partition by run_id) as paths_used,
        row_number() over (partition by run_id order by tokens desc, path) as place
    from path_tokens
),
covered as (
    select
        run_id,
        place,
        tokens_all,
        paths_used,
        sum(tokens) over (partition by run_id order by place rows between unbounded preceding and current row) as tokens_so_far
    from ranked
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
