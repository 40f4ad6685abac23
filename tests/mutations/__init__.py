"""Files that users give or keep, changed at random: every one is read as it stands, or refused in one clear error."""
