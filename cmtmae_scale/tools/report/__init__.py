"""One page that says what a run did, from the files of its folder."""
