# SPDX-License-Identifier: Apache-2.0
# Says whether this release is one that find_package(optpoline VERSION) asks for. As semantic
# versioning has it, releases 0.x promise nothing across x, and later ones nothing across majors.

file(STRINGS "${CMAKE_CURRENT_LIST_DIR}/../../pkgconfig/optpoline.pc" PACKAGE_VERSION
    REGEX "^Version: ")
string(REPLACE "Version: " "" PACKAGE_VERSION "${PACKAGE_VERSION}")

set(PACKAGE_VERSION_COMPATIBLE FALSE)
set(PACKAGE_VERSION_EXACT FALSE)
if(PACKAGE_FIND_VERSION_RANGE)
    # What a range excludes is said by the project, so it alone decides.
    if(PACKAGE_VERSION VERSION_GREATER_EQUAL PACKAGE_FIND_VERSION_MIN
            AND (PACKAGE_VERSION VERSION_LESS PACKAGE_FIND_VERSION_MAX
                OR (PACKAGE_FIND_VERSION_RANGE_MAX STREQUAL "INCLUDE"
                    AND PACKAGE_VERSION VERSION_EQUAL PACKAGE_FIND_VERSION_MAX)))
        set(PACKAGE_VERSION_COMPATIBLE TRUE)
    endif()
elseif(PACKAGE_FIND_VERSION VERSION_EQUAL PACKAGE_VERSION)
    set(PACKAGE_VERSION_COMPATIBLE TRUE)
    set(PACKAGE_VERSION_EXACT TRUE)
elseif(PACKAGE_FIND_VERSION VERSION_LESS PACKAGE_VERSION)
    string(REGEX MATCH "^(0\\.[0-9]+|[1-9][0-9]*)" optpoline_promise_ "${PACKAGE_VERSION}")
    string(REGEX MATCH "^(0\\.[0-9]+|[1-9][0-9]*)" optpoline_wish_ "${PACKAGE_FIND_VERSION}")
    if(NOT PACKAGE_FIND_VERSION OR optpoline_promise_ STREQUAL optpoline_wish_)
        set(PACKAGE_VERSION_COMPATIBLE TRUE)
    endif()
    unset(optpoline_promise_)
    unset(optpoline_wish_)
endif()
