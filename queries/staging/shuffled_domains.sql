-- shuffled_domains: the true domains of the prompts, and domains assigned to the prompts at random.
-- One row per run, shuffle and prompt with a token of kind prompt or generated that has rows at some layer. An empty,
-- skipped or failed prompt counts in no domain, so a domain must not get another prompt in place of it. Shuffle 0 has the
-- true domains. In shuffle s = 1, 2, ... the prompts are sorted by a number computed only from prompt_id and s, so that
-- every engine shuffles identically; the first in that order gets the domain of the first of these prompts, and so on.
-- Each domain keeps its number of prompts.
-- The number: x = 48271 p + 69621 s + 11, squared and mixed twice modulo the prime 2^31 - 1.
-- Parameters:
--   shuffles (count): how many, at most 1000; default 20.
--   run (run): default every run.
create or replace view shuffled_domains as
with digits as (
    select unnest(string_split('0,1,2,3,4,5,6,7,8,9', ',')) as digit
),
numbers as (
    select 100 * hundreds.digit::bigint + 10 * tens.digit::bigint + ones.digit::bigint + 1 as shuffle
    from digits as hundreds
    cross join digits as tens
    cross join digits as ones
),
counted as (
    select distinct
        run_id,
        prompt_id,
        domain
    from routing
    where kind <> 'special'
        and (getvariable('run') is null or run_id = getvariable('run')::varchar)
),
numbered as (
    select
        run_id,
        prompt_id,
        domain,
        row_number() over (partition by run_id order by prompt_id asc) as place
    from counted
),
seeds as (
    select
        numbered.run_id as run_id,
        numbered.prompt_id as prompt_id,
        numbers.shuffle as shuffle,
        (numbered.prompt_id * 48271 + numbers.shuffle * 69621 + 11) % 2147483647 as x
    from numbered
    cross join numbers
    where numbers.shuffle <= coalesce(getvariable('shuffles'), 20)
),
stirred as (
    select
        run_id,
        prompt_id,
        shuffle,
        (x * x + 16807 * shuffle + prompt_id % 2147483647) % 2147483647 as x
    from seeds
),
dealt as (
    select
        run_id,
        prompt_id,
        shuffle,
        row_number() over (
            partition by run_id, shuffle
            order by (x * x + 69621 * x) % 2147483647 asc, prompt_id asc
        ) as place
    from stirred
)
select
    run_id,
    0::bigint as shuffle,
    prompt_id,
    domain
from numbered
union all
select
    dealt.run_id as run_id,
    dealt.shuffle as shuffle,
    dealt.prompt_id as prompt_id,
    numbered.domain as domain
from dealt
join numbered
    on numbered.run_id = dealt.run_id
    and numbered.place = dealt.place;

comment on view shuffled_domains is 'Staging. One row per shuffle and prompt: its assigned domain; in shuffle 0, its own.';
comment on column shuffled_domains.run_id is 'The run these rows belong to.';
comment on column shuffled_domains.shuffle is '0: the true domains; 1, 2, ...: domains assigned at random.';
comment on column shuffled_domains.prompt_id is '0-based ordinal of the prompt in the input.';
comment on column shuffled_domains.domain is 'The domain assigned to the prompt; NULL counts as a domain.';
