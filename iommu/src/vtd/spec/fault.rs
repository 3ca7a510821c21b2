//! Why the unit blocked a request: every reason code (sections 7.1.3 and 5.1.4.1), and what it says to
//! people.
//!
//! The spec has one set of codes for legacy mode (1h to Eh), one for interrupt remapping (20h to 29h)
//! and one for scalable mode (30h to 91h); the name that its tables give each condition is in brackets.
#![forbid(unsafe_code)]

use crate::FaultReason;

/// Makes a constant of each row, and one table of their texts.
macro_rules! reasons {
    ($($name:ident $code:literal $condition:literal $text:literal)*) => {
        /// One constant for each reason code.
        impl FaultReason {
            $(
                #[doc = concat!("`", stringify!($code), "` [", $condition, "]: ", $text, ".")]
                pub const $name: FaultReason = FaultReason($code);
            )*

            /// What happened, for people: a clause without a full stop. Codes that rev 4.1 does not
            /// have are "unknown".
            pub const fn describe(self) -> &'static str {
                match self {
                    $(FaultReason::$name => $text,)*
                    _ => "unknown",
                }
            }
        }

        #[cfg(test)]
        const CODES: &[u8] = &[$($code),*];
    };
}

reasons! {
    ROOT_NOT_PRESENT 0x01 "LRT.2" "the root entry is not present"
    CONTEXT_NOT_PRESENT 0x02 "LCT.2" "the context entry is not present"
    CONTEXT_INVALID 0x03 "LCT.4" "the context entry is invalid: address width or translation type not supported, or no memory at its page table"
    ADDRESS_BEYOND_WIDTH 0x04 "LGN.1" "the address is beyond the width that the context entry or the unit allows"
    WRITE_DENIED 0x05 "LGN.2" "a write to a page without write permission"
    READ_DENIED 0x06 "LGN.3" "a read from a page without read permission"
    PAGE_ENTRY_ACCESS 0x07 "LSS.1" "no memory at the next second-stage table"
    ROOT_ENTRY_ACCESS 0x08 "LRT.1" "no memory at the root table"
    CONTEXT_ENTRY_ACCESS 0x09 "LCT.1" "no memory at the context table"
    ROOT_RESERVED 0x0a "LRT.3" "a reserved bit is set in the root entry"
    CONTEXT_RESERVED 0x0b "LCT.3" "a reserved bit is set in the context entry"
    PAGE_ENTRY_RESERVED 0x0c "LSS.2" "a reserved bit is set in a second-stage entry"
    TRANSLATION_BLOCKED 0x0d "LCT.5" "the context entry blocks translation requests and translated requests"
    INTERRUPT_RANGE_OUTPUT 0x0e "LGN.4" "the address translates to the interrupt address range"
    IR_REQUEST_RESERVED 0x20 "5.1.4.1" "a reserved field is set in the interrupt request"
    IR_INDEX_BEYOND_TABLE 0x21 "5.1.4.1" "the interrupt index is beyond the interrupt remapping table"
    IR_NOT_PRESENT 0x22 "5.1.4.1" "the interrupt remapping entry is not present"
    IR_ENTRY_ACCESS 0x23 "5.1.4.1" "no memory at the interrupt remapping entry"
    IR_ENTRY_RESERVED 0x24 "5.1.4.1" "a reserved field is set in the interrupt remapping entry"
    IR_COMPATIBILITY_BLOCKED 0x25 "5.1.4.1" "an interrupt request in compatibility format is blocked"
    IR_SOURCE_DENIED 0x26 "5.1.4.1" "the interrupt remapping entry belongs to another requester"
    IR_POSTED_ACCESS 0x27 "5.1.4.1" "no memory at the posted-interrupt descriptor"
    IR_POSTED_RESERVED 0x28 "5.1.4.1" "a reserved field is set in the posted-interrupt descriptor"
    IR_UNTRANSLATED_BLOCKED 0x29 "5.1.4.1" "an untranslated interrupt request is blocked"
    TABLE_MODE_INVALID 0x30 "RTA.1" "the root table address register has a translation table mode that is reserved or not supported"
    TABLE_MODE_PASID 0x31 "RTA.2" "a request with PASID in legacy mode"
    TABLE_MODE_PAGE_REQUEST 0x32 "RTA.3" "a page request in legacy mode"
    TABLE_MODE_ABORT 0x33 "RTA.4" "all DMA is blocked: abort-DMA mode"
    SM_ROOT_ENTRY_ACCESS 0x38 "SRT.1" "no memory at the root table"
    SM_ROOT_NOT_PRESENT 0x39 "SRT.2" "this half of the root entry is not present"
    SM_ROOT_RESERVED 0x3a "SRT.3" "a reserved bit is set in the root entry"
    SM_CONTEXT_ENTRY_ACCESS 0x40 "SCT.1" "no memory at the context table"
    SM_CONTEXT_NOT_PRESENT 0x41 "SCT.2" "the context entry is not present"
    SM_CONTEXT_RESERVED 0x42 "SCT.3" "a reserved bit is set in the context entry"
    SM_CONTEXT_INVALID 0x43 "SCT.4" "the context entry is invalid: its RID_PASID is beyond its PASID directory"
    SM_DEVICE_TLB_OFF 0x44 "SCT.5" "a translation request or translated request, with DTE clear in the context entry"
    SM_PASID_OFF 0x45 "SCT.6" "a request with PASID, with PASIDE clear in the context entry"
    SM_PASID_BEYOND_DIRECTORY 0x46 "SCT.7" "a request with a PASID beyond the PASID directory"
    SM_PAGE_REQUEST_OFF 0x47 "SCT.8" "a page request, with PRE clear in the context entry"
    SM_RID_PASID 0x48 "SCT.9" "the RID_PASID of the context entry is in error"
    PASID_DIRECTORY_ACCESS 0x50 "SPD.1" "no memory at the PASID directory"
    PASID_DIRECTORY_NOT_PRESENT 0x51 "SPD.2" "the PASID directory entry is not present"
    PASID_DIRECTORY_RESERVED 0x52 "SPD.3" "a reserved bit is set in the PASID directory entry"
    PASID_ENTRY_ACCESS 0x58 "SPT.1" "no memory at the PASID table"
    PASID_NOT_PRESENT 0x59 "SPT.2" "the PASID entry is not present"
    PASID_RESERVED 0x5a "SPT.3" "a reserved bit is set in the PASID entry"
    PASID_INVALID 0x5b "SPT.4" "the PASID entry is invalid: translation type, address width or paging mode not supported"
    PASID_EXECUTE_OFF 0x5c "SPT.5" "an execute request, with ERE clear in the PASID entry"
    PASID_SUPERVISOR_OFF 0x5d "SPT.6" "a request with supervisor privilege, with SRE clear in the PASID entry"
    FS_ENTRY_ACCESS 0x70 "SFS.1" "no memory at the next first-stage table"
    FS_NOT_PRESENT 0x71 "SFS.2" "a first-stage entry is not present"
    FS_RESERVED 0x72 "SFS.3" "a reserved bit is set in a first-stage entry"
    FS_TABLE_ACCESS 0x73 "SFS.4" "no memory at the top first-stage table"
    FS_NESTED_BEYOND_WIDTH 0x74 "SFS.5" "a first-stage table lies beyond the second stage's width (nested)"
    FS_NESTED_TABLE_DENIED 0x75 "SFS.6" "the second stage denies reading the top first-stage table (nested)"
    FS_NESTED_READ_DENIED 0x76 "SFS.7" "the second stage denies reading a first-stage table (nested)"
    FS_NESTED_WRITE_DENIED 0x77 "SFS.8" "the second stage denies writing a first-stage table (nested)"
    SS_ENTRY_ACCESS 0x78 "SSS.1" "no memory at the next second-stage table"
    SS_NOT_PRESENT 0x79 "SSS.2" "a second-stage entry allows neither reads nor writes"
    SS_RESERVED 0x7a "SSS.3" "a reserved bit is set in a second-stage entry"
    SS_TABLE_ACCESS 0x7b "SSS.4" "no memory at the top second-stage table"
    SS_UPDATE_NO_SNOOP 0x7c "SSS.5" "a second-stage accessed or dirty bit has to be set, but walks do not snoop"
    SS_UPDATE_FAILED 0x7d "SSS.6" "a second-stage accessed or dirty bit could not be set"
    NOT_CANONICAL 0x80 "SGN.1" "the address is not canonical for the first-stage tables"
    USER_DENIED 0x81 "SGN.2" "a request with user privilege to a supervisor page"
    EXECUTE_DENIED 0x82 "SGN.3" "an execute request to a page without execute permission"
    SM_ADDRESS_BEYOND_HOST 0x83 "SGN.4" "the address is beyond the host address width"
    SM_ADDRESS_BEYOND_WIDTH 0x84 "SGN.5" "the address is beyond the width that the PASID entry or the unit allows"
    SM_WRITE_DENIED 0x85 "SGN.6" "a write to a page without write permission"
    SM_READ_DENIED 0x86 "SGN.7" "a read from a page without read permission"
    SM_INTERRUPT_RANGE_OUTPUT 0x87 "SGN.8" "the address translates to the interrupt address range"
    FS_UPDATE_NO_SNOOP 0x90 "SFS.9" "a first-stage accessed or dirty bit has to be set, but walks do not snoop"
    FS_UPDATE_FAILED 0x91 "SFS.10" "a first-stage accessed or dirty bit could not be set"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_of_the_tables_has_a_text_and_no_other() {
        let ranges = [
            0x01..=0x0e,
            0x20..=0x29,
            0x30..=0x33,
            0x38..=0x3a,
            0x40..=0x48,
            0x50..=0x52,
            0x58..=0x5d,
            0x70..=0x7d,
            0x80..=0x87,
            0x90..=0x91,
        ];
        for code in 0..=u8::MAX {
            let defined = ranges.iter().any(|range| range.contains(&code));
            assert_eq!(CODES.contains(&code), defined, "{code:#x}");
            let text = FaultReason(code).describe();
            assert_eq!(text != "unknown", defined, "{code:#x}: {text}");
        }
        assert_eq!(CODES.len(), ranges.into_iter().flatten().count());
    }
}
