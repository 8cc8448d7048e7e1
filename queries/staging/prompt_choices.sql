-- prompt_choices: how often the tokens of each prompt choose each expert.
-- One row per run, prompt, layer and expert that a token of the prompt of kind prompt or generated chooses.
-- Parameters:
--   run (run): default every run.
--   layer (layer): default every layer.
create or replace view prompt_choices as
select
    run_id,
    prompt_id,
    domain,
    layer,
    expert,
    count(*)::bigint as tokens
from routing
where kind <> 'special'
    and (getvariable('run') is null or run_id = getvariable('run')::varchar)
    and (getvariable('layer') is null or layer = getvariable('layer'))
group by
    run_id,
    prompt_id,
    domain,
    layer,
    expert;

comment on view prompt_choices is 'Staging. One row per prompt, layer and expert: how many of the prompt''s tokens choose it.';
comment on column prompt_choices.run_id is 'The run these rows belong to.';
comment on column prompt_choices.prompt_id is '0-based ordinal of the prompt in the input.';
comment on column prompt_choices.domain is 'Kind of data, as the input labels it; NULL counts as a domain.';
comment on column prompt_choices.layer is 'Layer index in the model.';
comment on column prompt_choices.expert is '0-based expert index within the layer.';
comment on column prompt_choices.tokens is 'Tokens of the prompt routed to the expert.';
