-- vocabulary_texts: the text of each entry of each vocabulary, once for all runs that have the same.
-- One row per vocabulary and entry. Grouped, so that DuckDB knows that an entry has one text and can skip a join.
-- In DuckDB, moewh reads one file per vocabulary for it, however many runs have the same.
-- Source: vocabulary and runs.
create or replace view vocabulary_texts as
select
    runs.vocabulary_key as vocabulary_key,
    vocabulary.vocab_id as vocab_id,
    min(vocabulary.token) as token
from vocabulary
join runs
    on runs.run_id = vocabulary.run_id
group by
    runs.vocabulary_key,
    vocabulary.vocab_id;

comment on view vocabulary_texts is 'Staging. One row per vocabulary and entry: its text.';
comment on column vocabulary_texts.vocabulary_key is 'The key of the vocabulary, as in runs and routing.';
comment on column vocabulary_texts.vocab_id is 'The tokenizer''s id of the entry.';
comment on column vocabulary_texts.token is 'The entry decoded to text by itself; NULL if it has no text.';
