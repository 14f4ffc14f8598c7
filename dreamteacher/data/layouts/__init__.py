"""Public data sets as they are downloaded, one file each."""
