"""Our codec and attention beside other projects' own code: one small file per peer."""
