"""Assets of a foreign library: a profile without a parent, whose blocks someone else measured."""
