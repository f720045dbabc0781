"""What a teacher cache would cost against the online teacher."""
